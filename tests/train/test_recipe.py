"""All four stages on a micro model and generated photos: they run, resume, and yield a model that loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hitsr_fast.losses.config import ReconstructionLossConfig
from hitsr_fast.metrics.lpips_weights import LpipsWeightsNotFoundError
from hitsr_fast.models.config import PRESETS
from hitsr_fast.models.hit_var import HitVar, load_pretrained
from hitsr_fast.train.config import (
    AutoencoderConfig,
    DecoderTrainConfig,
    LoopConfig,
    Recipe,
    TokenizerTrainConfig,
    TransformerTrainConfig,
)
from hitsr_fast.train.recipe import pair_batches, train_model
from hitsr_fast.train.transformer import TransformerStage
from tests.models.micro import MICRO
from tests.train.photos import write_photos

PIXELS = ReconstructionLossConfig(alex=0.0, vgg=0.0)
LOOP = LoopConfig(steps=3, checkpoint_minutes=0.0, log_every=1, eval_every=2)
RECIPE = Recipe(
    preset="micro",
    holdout=("held",),
    codebook_images=32,
    autoencoder=AutoencoderConfig(batch=4, loss=PIXELS),
    autoencoder_loop=LOOP,
    tokenizer=TokenizerTrainConfig(batch=4, loss=PIXELS, train_encoder=True, codebook_lr=1e-4),
    tokenizer_loop=LOOP,
    transformer=TransformerTrainConfig(batch=4, mistake_codes=8),
    transformer_loop=LOOP,
    decoder=DecoderTrainConfig(batch=4, loss=PIXELS),
    decoder_loop=LOOP,
)
STAGES = ("autoencoder", "tokenizer", "transformer", "decoder")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(autouse=True)
def _without_lpips_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path / "empty"))


@pytest.fixture(autouse=True)
def _micro_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    # Twice the stride: the metrics want images of more than eight pixels.
    tokenizer = replace(MICRO.tokenizer, linear_skip=True, stem_patch=8)
    monkeypatch.setitem(PRESETS, "micro", replace(MICRO, tokenizer=tokenizer))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums come in the same order each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(a: HitVar, b: HitVar) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_broken_run_ends_as_an_unbroken_one(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = train_model(RECIPE, photos, tmp_path / "run")
    assert not model.training
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *(f"{stage}.pt" for stage in STAGES),
        "log.jsonl",
        "model",
    }
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in entries if "done" in entry] == list(STAGES)
    names = {key for entry in entries for key in entry}
    assert {"held_out_psnr_y", "held_out_64_psnr_y", "held_out_loss", "codes", "accuracy"} <= names
    assert not any("lpips" in name for name in names), "no entry where the weights are absent"

    loaded = load_pretrained(tmp_path / "run" / "model")
    assert loaded.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.half().float()), key

    # Stopped in the third stage, and taken up again.
    with monkeypatch.context() as patch:
        real = TransformerStage.loss

        def stopped(self: TransformerStage, step: int) -> object:
            if step == 2:
                raise KeyboardInterrupt
            return real(self, step)

        patch.setattr(TransformerStage, "loss", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_model(RECIPE, photos, tmp_path / "broken")
    assert not (tmp_path / "broken" / "model").exists()
    assert same(train_model(RECIPE, photos, tmp_path / "broken"), model)

    # All is done: nothing is trained, the model is written again.
    log = (tmp_path / "broken" / "log.jsonl").read_text()
    assert same(train_model(RECIPE, photos, tmp_path / "broken"), model)
    assert (tmp_path / "broken" / "log.jsonl").read_text() == log


def test_stages_train_what_they_say(photos: Path, tmp_path: Path) -> None:
    """Weights that a stage leaves alone are the same before and after it."""
    none = replace(LOOP, steps=0)
    recipe = replace(
        RECIPE, tokenizer_loop=none, transformer_loop=none, decoder_loop=none, autoencoder_loop=none
    )
    states = []
    for stage in ("", "tokenizer_loop", "transformer_loop", "decoder_loop"):
        recipe = replace(recipe, **({stage: LOOP} if stage else {}))
        states.append(train_model(recipe, photos, tmp_path / (stage or "none")).state_dict())
    changed = [
        {_part(key) for key in after if not torch.equal(before[key], after[key])}
        for before, after in pairwise(states)
    ]
    # A new codebook also gives the classifier another start.
    assert changed[0] - {"transformer"} == {"encoder", "quant_conv", "quantize", "decoders"}
    assert changed[1] == {"transformer"}
    assert changed[2] == {"decoders"}


def _part(key: str) -> str:
    names = key.split(".")
    return names[1] if names[0] == "tokenizer" else names[0]


def test_held_out_photos_are_not_trained_on(photos: Path) -> None:
    trained, held = pair_batches(RECIPE, MICRO, photos, "cpu")
    assert trained.photos.names == ["a.png", "b.png"]
    assert held.photos.names == ["held.png"]


def test_a_batch_is_a_function_of_its_step(photos: Path) -> None:
    batches, _ = pair_batches(replace(RECIPE, clean_prob=0.5), MICRO, photos, "cpu")
    hr, upsampled, class_id = batches(3, 4)
    assert hr.shape == upsampled.shape == (4, 3, 32, 32)
    for images in (hr, upsampled):
        assert images.min() >= -1 - 1e-6 and images.max() <= 1 + 1e-6 and images.min() < -0.1
    assert class_id.dtype == torch.int64 and set(class_id.tolist()) <= {0, 1}
    again = pair_batches(replace(RECIPE, clean_prob=0.5), MICRO, photos, "cpu")[0](3, 4)
    assert all(torch.equal(a, b) for a, b in zip((hr, upsampled, class_id), again, strict=True))
    assert not torch.equal(hr, batches(4, 4)[0])
    assert torch.equal(batches.hr(3, 4), hr)
    # Steps share no crop, whatever the batch: sample i is the same in batches of 4 and of 2.
    assert torch.equal(batches(6, 2)[0], hr[:2]) and torch.equal(batches(6, 2)[1], upsampled[:2])


def test_unknown_preset(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preset: expected one of .* found 'hit-huge'"):
        train_model(replace(RECIPE, preset="hit-huge"), photos, tmp_path)


def test_missing_lpips_weights_are_found_before_the_first_stage(photos: Path, tmp_path: Path) -> None:
    wants_vgg = replace(RECIPE, decoder=DecoderTrainConfig())
    with pytest.raises(LpipsWeightsNotFoundError, match="hitsr-fast weights lpips"):
        train_model(wants_vgg, photos, tmp_path / "run")
    assert not (tmp_path / "run").exists()
