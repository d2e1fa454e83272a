"""Training by the kernels and by the reference backend are one training: the losses of each step agree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hitsr_fast.dispatch import use_backend
from hitsr_fast.train.config import CheckpointConfig
from hitsr_fast.train.run import train
from tests.tolerances import TOLERANCES
from tests.train.micro import micro_recipe
from tests.train.photos import write_photos


@pytest.mark.parametrize(
    ("steps", "phases"),
    [(10, 3), pytest.param(200, 4, marks=pytest.mark.slow)],
    ids=["start", "whole"],
)
def test_losses_are_those_of_the_reference(tmp_path: Path, steps: int, phases: int) -> None:
    photos = write_photos(tmp_path / "photos")
    recipe = micro_recipe(tmp_path, steps)
    recipe = replace(recipe, phases=recipe.phases[:phases], checkpoint=CheckpointConfig())
    losses: dict[str, dict[str, list[float]]] = {}
    for backend in ("reference", None):
        folder = tmp_path / str(backend)
        with use_backend(backend):
            train(recipe, photos, folder, device="cpu")
        for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()):
            if line["kind"] == "step":
                losses.setdefault(line["phase"], {}).setdefault(str(backend), []).append(line["loss"])
    assert len(losses) == phases
    for phase, curves in losses.items():
        ours, expected = curves["None"], curves["reference"]
        assert len(ours) == len(expected) == steps
        assert len(set(ours)) > steps // 2, phase  # it does learn
        by_codes = steps == 10 and phase == "next_scale"
        rtol = TOLERANCES[f"loss_of_{steps}_steps" + "_by_codes" * by_codes].rtol
        for step, (a, b) in enumerate(zip(ours, expected, strict=True)):
            assert a == pytest.approx(b, rel=rtol), (phase, step)
