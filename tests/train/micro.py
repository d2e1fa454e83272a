"""A model and a recipe whose phases take seconds, through all that a real run has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from hitsr_fast.losses.config import ReconstructionLossConfig
from hitsr_fast.train.config import (
    AutoencodeConfig,
    CheckpointConfig,
    DataConfig,
    DecodeConfig,
    LogConfig,
    NextScaleConfig,
    Phase,
    PrecisionConfig,
    Recipe,
    ScheduleConfig,
    TokenizeConfig,
)
from tests.models.micro import MICRO

# Twice the stride of MICRO: the metrics want images of more than eight pixels.
CONFIG = replace(
    MICRO,
    tokenizer=replace(MICRO.tokenizer, linear_skip=True, stem_patch=8, decoder_lr=True),
    transformer=replace(MICRO.transformer, depth=1),
)
PIXELS = ReconstructionLossConfig(alex=0.0, vgg=0.0)


def micro_recipe(folder: Path, steps: int = 2) -> Recipe:
    """hit-tiny's four phases on `CONFIG`, which is written to `folder`; without LPIPS, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "micro.json"
    model.write_text(CONFIG.to_json())
    shared = {
        "batch": 4,
        "schedule": ScheduleConfig(steps=steps),
        "precision": PrecisionConfig(dtype="float32"),
    }
    phases = (
        Phase(name="autoencode", task=AutoencodeConfig(loss=PIXELS), **shared),  # type: ignore[arg-type]
        Phase(
            name="tokenize",
            task=TokenizeConfig(loss=PIXELS, codebook_images=16),
            init_from=("phase:autoencode",),
            **shared,  # type: ignore[arg-type]
        ),
        Phase(
            name="next_scale",
            task=NextScaleConfig(preference=1.0, mistakes=0.3, mistake_codes=8, head_from_codebook=True),
            init_from=("phase:tokenize",),
            **shared,  # type: ignore[arg-type]
        ),
        Phase(
            name="decode",
            task=DecodeConfig(loss=PIXELS),
            init_from=("phase:tokenize", "phase:next_scale"),
            **shared,  # type: ignore[arg-type]
        ),
    )
    return Recipe(
        name="micro",
        model=str(model),
        data=DataConfig(holdout=("held",), workers=0),
        phases=phases,
        checkpoint=CheckpointConfig(every=1),
        log=LogConfig(every=1, mfu=False),
    )


def write_recipe(folder: Path, steps: int = 2) -> Path:
    """`micro_recipe` as a file."""
    path = folder / "recipe.json"
    path.write_text(json.dumps(json.loads(micro_recipe(folder, steps).to_json())))
    return path
