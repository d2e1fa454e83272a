"""The configuration of a recipe's model."""

from __future__ import annotations

from pathlib import Path

from hitsr_fast.models.base import load_config
from hitsr_fast.models.hit_var import PRESETS, HitConfig
from hitsr_fast.train.config import NextScaleConfig, Recipe


def model_config(recipe: Recipe) -> HitConfig:
    """The configuration of the recipe's model; raises `ValueError` where the recipe does not fit it."""
    if recipe.model in PRESETS:
        config = PRESETS[recipe.model]
    elif Path(recipe.model).is_file():
        found = load_config(Path(recipe.model))
        if not isinstance(found, HitConfig):
            raise ValueError(f"model: expected a hit_var, found {found.model_type!r} in {recipe.model}")
        config = found
    else:
        expected = f"one of {', '.join(sorted(PRESETS))}, or a config.json"
        raise ValueError(f"model: expected {expected}, found {recipe.model!r}")
    codes = config.tokenizer.codebook_size
    for phase in recipe.phases:
        task = phase.task
        if (
            isinstance(task, NextScaleConfig)
            and not task.hierarchical
            and config.transformer.ar_grid != "full"
        ):
            expected = "true, or a model with ar_grid 'full', the one grid that plain tokens are made on"
            raise ValueError(f"{phase.name}.task.hierarchical: expected {expected}, found false")
        if isinstance(task, NextScaleConfig) and task.mistakes > 0 and task.mistake_codes >= codes:
            expected = f"fewer than the {codes} codes of the model"
            raise ValueError(
                f"{phase.name}.task.mistake_codes: expected {expected}, found {task.mistake_codes}"
            )
    return config
