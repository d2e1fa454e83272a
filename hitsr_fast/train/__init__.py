"""Training: a recipe, its four stages, and the loop that runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hitsr_fast._lazy import lazy
from hitsr_fast.train.config import (
    AutoencoderConfig,
    DecoderTrainConfig,
    LoopConfig,
    Recipe,
    TokenizerTrainConfig,
    TransformerTrainConfig,
)

if TYPE_CHECKING:
    from hitsr_fast.train.autoencoder import AutoencoderStage
    from hitsr_fast.train.decoder import DecoderStage
    from hitsr_fast.train.loop import ResumeError, train
    from hitsr_fast.train.recipe import train_model
    from hitsr_fast.train.stage import Stage
    from hitsr_fast.train.tokenizer import TokenizerStage
    from hitsr_fast.train.transformer import TransformerStage

__all__ = [
    "AutoencoderConfig",
    "AutoencoderStage",
    "DecoderStage",
    "DecoderTrainConfig",
    "LoopConfig",
    "Recipe",
    "ResumeError",
    "Stage",
    "TokenizerStage",
    "TokenizerTrainConfig",
    "TransformerStage",
    "TransformerTrainConfig",
    "train",
    "train_model",
]
__getattr__ = lazy(
    __name__,
    autoencoder=["AutoencoderStage"],
    decoder=["DecoderStage"],
    loop=["ResumeError", "train"],
    recipe=["train_model"],
    stage=["Stage"],
    tokenizer=["TokenizerStage"],
    transformer=["TransformerStage"],
)
