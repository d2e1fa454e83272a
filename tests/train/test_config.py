"""Values of a recipe: each has a range, and an error names the field, the range and what was found."""

from __future__ import annotations

import math
import re
from dataclasses import fields

import pytest

from hitsr_fast.losses.config import ReconstructionLossConfig
from hitsr_fast.train.config import (
    AutoencoderConfig,
    DecoderTrainConfig,
    LoopConfig,
    Recipe,
    StageConfig,
    TokenizerTrainConfig,
    TransformerTrainConfig,
)

ANY_COUNT, COUNT, SHARE = "at least 0", "at least 1", "a value in [0, 1]"
BELOW_ONE, POSITIVE = "a value in [0, 1)", "a value above 0"

RANGES: dict[type, dict[str, str]] = {
    LoopConfig: {
        "steps": ANY_COUNT,
        "minutes": POSITIVE,
        "warmup": BELOW_ONE,
        "final_lr": SHARE,
        "clip": POSITIVE,
        "ema": BELOW_ONE,
        "checkpoint_minutes": ANY_COUNT,
        "log_every": COUNT,
        "eval_every": ANY_COUNT,
    },
    AutoencoderConfig: {
        "batch": COUNT,
        "lr": POSITIVE,
        "weight_decay": ANY_COUNT,
        "lr_share": SHARE,
        "latent_noise": ANY_COUNT,
    },
    TokenizerTrainConfig: {
        "batch": COUNT,
        "lr": POSITIVE,
        "codebook_lr": ANY_COUNT,
        "weight_decay": ANY_COUNT,
        "commitment": ANY_COUNT,
        "codebook_weight": ANY_COUNT,
        "continuous_prob": SHARE,
    },
    TransformerTrainConfig: {
        "batch": COUNT,
        "lr": POSITIVE,
        "muon_lr": ANY_COUNT,
        "weight_decay": ANY_COUNT,
        "label_smoothing": SHARE,
        "scale_balance": ANY_COUNT,
        "mistakes": SHARE,
        "mistake_codes": COUNT,
    },
    DecoderTrainConfig: {
        "batch": COUNT,
        "lr": POSITIVE,
        "weight_decay": ANY_COUNT,
        "sampled": SHARE,
        "top_k": ANY_COUNT,
        "colour_fixed": SHARE,
    },
    ReconstructionLossConfig: {
        "alex": ANY_COUNT,
        "vgg": ANY_COUNT,
        "vgg_share": SHARE,
        "crop": COUNT,
        "jitter": ANY_COUNT,
    },
    Recipe: {"seed": ANY_COUNT, "clean_prob": SHARE, "codebook_images": COUNT},
}
WRONG: dict[str, list[float]] = {
    ANY_COUNT: [-1, -0.5, math.nan],
    COUNT: [0, -3, math.nan],
    SHARE: [-0.1, 1.1, math.nan],
    BELOW_ONE: [-0.1, 1.0, math.nan],
    POSITIVE: [0.0, -1.0, math.nan],
}
RIGHT: dict[str, list[float]] = {
    ANY_COUNT: [0, 7],
    COUNT: [1, 7],
    SHARE: [0, 0.5, 1],
    BELOW_ONE: [0, 0.99],
    POSITIVE: [1e-6, math.inf],
}
CASES = [(config, name, expected) for config, names in RANGES.items() for name, expected in names.items()]


STAGES = [config for config in RANGES if issubclass(config, StageConfig)]


@pytest.mark.parametrize(("config", "name", "expected"), CASES)
def test_ranges(config: type, name: str, expected: str) -> None:
    whole = type(getattr(config(), name)) is int
    for value in RIGHT[expected]:
        assert getattr(config(**{name: value}), name) == value
    for value in WRONG[expected]:
        found = "int" if whole and isinstance(value, float) else expected
        with pytest.raises(ValueError, match=re.escape(f"{name}: expected {found}, found {value}") + "$"):
            config(**{name: value})
    for value in (True, "1", None):
        kind = "int" if whole else "float"
        with pytest.raises(ValueError, match=re.escape(f"{name}: expected {kind}, found {value!r}") + "$"):
            config(**{name: value})


@pytest.mark.parametrize("config", STAGES)
def test_dtypes(config: type[StageConfig]) -> None:
    assert config().dtype == "auto"
    for dtype in ("float32", "bfloat16"):
        assert config(dtype=dtype).dtype == dtype  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype: expected .*'float32', 'bfloat16'.*, found 'float16'"):
        config(dtype="float16")  # type: ignore[arg-type]


@pytest.mark.parametrize("config", RANGES)
def test_every_number_has_a_range(config: type) -> None:
    numbers = {field.name for field in fields(config) if type(getattr(config(), field.name)) in (int, float)}
    assert numbers == set(RANGES[config])


def test_a_recipe_is_json_both_ways() -> None:
    recipe = Recipe(holdout=("a", "b"), decoder=DecoderTrainConfig(dtype="float32", sampled=0.5))
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(ValueError, match=r"config\.decoder: unknown keys \['dtpye'\]"):
        Recipe.from_json('{"decoder": {"dtpye": "float32"}}')
    with pytest.raises(ValueError, match=r"dtype: expected .*, found 'half'"):
        Recipe.from_json('{"decoder": {"dtype": "half"}}')
