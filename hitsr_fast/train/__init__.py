"""Training: one loop for every phase of every family. See docs/training.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hitsr_fast._lazy import lazy
from hitsr_fast.train.config import (
    AutoencodeConfig,
    CheckpointConfig,
    DataConfig,
    DecodeConfig,
    LogConfig,
    NextScaleConfig,
    OptimConfig,
    ParallelConfig,
    Phase,
    PrecisionConfig,
    Recipe,
    ScheduleConfig,
    TokenizeConfig,
)
from hitsr_fast.train.overrides import override
from hitsr_fast.train.recipes import load_recipe, recipe_names

if TYPE_CHECKING:
    from hitsr_fast.train.artifacts import StaleError
    from hitsr_fast.train.draw import Draw
    from hitsr_fast.train.run import train
    from hitsr_fast.train.task import Batch, Group, Losses, Task
    from hitsr_fast.train.trainer import Stopped, fit

__all__ = [
    "AutoencodeConfig",
    "Batch",
    "CheckpointConfig",
    "DataConfig",
    "DecodeConfig",
    "Draw",
    "Group",
    "LogConfig",
    "Losses",
    "NextScaleConfig",
    "OptimConfig",
    "ParallelConfig",
    "Phase",
    "PrecisionConfig",
    "Recipe",
    "ScheduleConfig",
    "StaleError",
    "Stopped",
    "Task",
    "TokenizeConfig",
    "fit",
    "load_recipe",
    "override",
    "recipe_names",
    "train",
]
__getattr__ = lazy(
    __name__,
    artifacts=["StaleError"],
    draw=["Draw"],
    run=["train"],
    task=["Batch", "Group", "Losses", "Task"],
    trainer=["Stopped", "fit"],
)
