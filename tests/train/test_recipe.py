"""All four stages on a micro model and generated photos: they run, resume, and yield a model that loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hitsr_fast.losses.config import ReconstructionLossConfig
from hitsr_fast.metrics.lpips_weights import LpipsWeightsNotFoundError
from hitsr_fast.models import HitVar
from hitsr_fast.models.hit_var.config import PRESETS
from hitsr_fast.train.config import (
    AutoencoderConfig,
    DecoderTrainConfig,
    LoopConfig,
    Recipe,
    TokenizerTrainConfig,
    TransformerTrainConfig,
)
from hitsr_fast.train.decoder import DecoderStage
from hitsr_fast.train.loop import ResumeError
from hitsr_fast.train.recipe import made_with, pair_batches, train_model
from hitsr_fast.train.transformer import TransformerStage
from tests.models.micro import MICRO
from tests.train.photos import write_photos

PIXELS = ReconstructionLossConfig(alex=0.0, vgg=0.0)
L2 = replace(PIXELS, pixel="l2")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LOOP = LoopConfig(steps=2, checkpoint_minutes=0.0, log_every=1, eval_every=0)
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


@pytest.fixture(scope="module", autouse=True)
def _micro_preset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A preset for `RECIPE`, no LPIPS weights, and one thread, so that sums come in the same order."""
    # Twice the stride: the metrics want images of more than eight pixels.
    tokenizer = replace(MICRO.tokenizer, linear_skip=True, stem_patch=8, decoder_lr=True)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        transformer = replace(MICRO.transformer, depth=1)
        patch.setitem(PRESETS, "micro", replace(MICRO, tokenizer=tokenizer, transformer=transformer))
        patch.setenv("HITSR_FAST_CACHE", str(tmp_path_factory.mktemp("empty")))
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


class Run(NamedTuple):
    """A run of all stages, none of them interrupted."""

    folder: Path
    model: HitVar
    states: list[dict[str, Tensor]]
    """The whole model's weights before the first stage and after each stage."""


@pytest.fixture(scope="module")
def run(_micro_preset: None, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One stage more at each call, in one folder."""
    folder = tmp_path_factory.mktemp("run")
    recipe = replace(RECIPE, **{f"{stage}_loop": replace(LOOP, steps=0) for stage in STAGES})  # type: ignore[arg-type]
    model = train_model(recipe, photos, folder)
    states = [model.state_dict()]
    for stage in STAGES:
        recipe = replace(recipe, **{f"{stage}_loop": LOOP})  # type: ignore[arg-type]
        model = train_model(recipe, photos, folder)
        states.append(model.state_dict())
    return Run(folder, model, states)


def same(a: HitVar, b: HitVar) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_run_leaves_a_model_and_a_log(run: Run) -> None:
    model = run.model
    assert not model.training
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert {path.name for path in run.folder.iterdir()} == {
        *(f"{stage}.pt" for stage in STAGES),
        "log.jsonl",
        "model",
    }
    entries = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in entries if "done" in entry] == list(STAGES)
    names = {key for entry in entries for key in entry}
    assert {"held_out_psnr_y", "held_out_64_psnr_y", "held_out_loss", "codes", "accuracy"} <= names
    assert not any("lpips" in name for name in names), "no entry where the weights are absent"

    loaded = HitVar.from_pretrained(run.folder / "model")
    assert loaded.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.half().float()), key


def test_a_broken_run_ends_as_an_unbroken_one(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        real = TransformerStage.loss

        def stopped(self: TransformerStage, step: int) -> object:
            if step == 1:
                raise KeyboardInterrupt
            return real(self, step)

        patch.setattr(TransformerStage, "loss", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_model(RECIPE, photos, tmp_path)
    assert not (tmp_path / "model").exists()
    assert same(train_model(RECIPE, photos, tmp_path), run.model)


def test_a_finished_run_is_not_trained_again(run: Run, photos: Path) -> None:
    log = (run.folder / "log.jsonl").read_text()
    shutil.rmtree(run.folder / "model")
    assert same(train_model(RECIPE, photos, run.folder), run.model)
    assert (run.folder / "log.jsonl").read_text() == log
    assert (run.folder / "model").is_dir()


def test_stages_train_what_they_say(run: Run) -> None:
    """Weights that a stage leaves alone are the same before and after it."""
    changed = [
        {_part(key) for key in after if not torch.equal(before[key], after[key])}
        for before, after in pairwise(run.states)
    ]
    # Another encoder gives another codebook, and that gives the classifier another start.
    assert changed[0] == {"encoder", "quant_conv", "quantize", "decoders", "transformer"}
    assert changed[1] - {"transformer"} == {"encoder", "quant_conv", "quantize", "decoders"}
    assert changed[2] == {"transformer"}
    assert changed[3] == {"decoders"}


@pytest.mark.parametrize(
    ("change", "stage", "message"),
    [
        (
            {"preset": "micro-wide"},
            "autoencoder",
            r"preset='micro', not 'micro-wide'; .*model\.transformer\.width",
        ),
        ({"seed": 5}, "autoencoder", "seed=0, not 5; resume"),
        (
            {"decoder": replace(RECIPE.decoder, lr=0.5, batch=6)},
            "decoder",
            r"decoder\.batch=4, not 6; decoder\.lr=0\.0004, not 0\.5; resume",
        ),
        (
            {"autoencoder_loop": replace(LOOP, ema=0.5)},
            "autoencoder",
            r"autoencoder_loop\.ema=0\.995, not 0\.5;",
        ),
        (
            {"autoencoder": replace(RECIPE.autoencoder, loss=L2)},
            "autoencoder",
            r"autoencoder\.loss\.pixel='l1', not 'l2';",
        ),
    ],
)
def test_another_recipe_does_not_resume(
    run: Run,
    photos: Path,
    change: dict[str, object],
    stage: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    micro = PRESETS["micro"]
    wide = replace(micro, name="micro-wide", transformer=replace(micro.transformer, width=32))
    monkeypatch.setitem(PRESETS, "micro-wide", wide)
    log = (run.folder / "log.jsonl").read_text()
    with pytest.raises(ResumeError, match=rf"{stage}\.pt: was made with {message}") as caught:
        train_model(replace(RECIPE, **change), photos, run.folder)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert (run.folder / "log.jsonl").read_text() == log


def test_length_and_pace_may_change_on_resume() -> None:
    other = replace(
        RECIPE,
        decoder_loop=replace(LOOP, steps=9, minutes=1.0, checkpoint_minutes=5.0, log_every=7, eval_every=3),
        transformer=replace(RECIPE.transformer, compile=True),
    )
    assert all(made_with(other, stage) == made_with(RECIPE, stage) for stage in STAGES)


def test_every_value_of_the_recipe_is_compared_or_free() -> None:
    """No field of the recipe is forgotten."""
    compared = {name for stage in STAGES for name in made_with(RECIPE, stage)}
    assert compared == {field.name for field in fields(Recipe)} | {"model"}


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_decoders_may_be_trained_on_drawn_tokens(run: Run, photos: Path, top_k: int, device: str) -> None:
    batches, held_out = pair_batches(RECIPE, run.model.config, photos, device)
    model = deepcopy(run.model).to(device)
    config = replace(RECIPE.decoder, top_k=top_k)
    loss = DecoderStage(model, batches, held_out, config).loss
    first, again, other = loss(0)[0], loss(0)[0], loss(1)[0]
    assert first.isfinite() and torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, DecoderStage(model, batches, held_out, RECIPE.decoder).loss(0)[0])


def test_only_sampled_tokens_are_decoded_beside_the_lr_image(
    run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, held_out = pair_batches(RECIPE, run.model.config, photos, "cpu")
    model = deepcopy(run.model)
    seen: list[tuple[int, Tensor | None]] = []
    real = model.tokenizer.decode

    def decode(latent: Tensor, target: int, lr: Tensor | None = None) -> Tensor:
        seen.append((len(latent), lr))
        return real(latent, target, lr)

    monkeypatch.setattr(model.tokenizer, "decode", decode)
    DecoderStage(model, batches, held_out, replace(RECIPE.decoder, sampled=0.75)).loss(0)
    lr = batches.pairs(0, 4)[1]
    assert [count for count, _ in seen] == [3, 1] * 3
    for target in range(3):
        image, none = seen[2 * target][1], seen[2 * target + 1][1]
        assert none is None and image is not None
        assert torch.equal(image, model.lr_image(lr[:3], target))


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
