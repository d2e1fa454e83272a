"""The train command: every value of a recipe is an option, mistakes are one clear line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from PIL import Image

from hitsr_fast.backends import NAMES
from hitsr_fast.cli import main
from hitsr_fast.cli.train import Train
from hitsr_fast.models.hit_var.config import HIT_TINY
from hitsr_fast.ops import instruction_sets
from hitsr_fast.train import recipe as recipe_module
from hitsr_fast.train.config import Recipe
from hitsr_fast.train.loop import ResumeError
from tests.ops.backends import require

CODES = HIT_TINY.tokenizer.codebook_size


def parse(*args: str | Path) -> Train:
    return tyro.cli(Train, args=[*map(str, args)])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (200, 200)).save(folder / f"{name}.png")
    return folder


def test_defaults_are_the_recipe() -> None:
    command = parse("photos", "run")
    assert (command.photos, command.run_folder) == (Path("photos"), Path("run"))
    assert command.recipe == Recipe()
    assert command.device == "auto"


def test_values_of_the_recipe_are_options() -> None:
    command = parse(
        *("photos", "run", "--seed", "3", "--holdout", "a", "b", "--transformer.lr", "0.1"),
        *("--decoder-loop.steps", "0", "--tokenizer.loss.vgg", "0.5", "--tokenizer.train-encoder"),
        *("--decoder.dtype", "float32"),
    )
    found = command.recipe
    assert (found.seed, found.holdout) == (3, ("a", "b"))
    assert (found.transformer.lr, found.decoder_loop.steps, found.tokenizer.loss.vgg) == (0.1, 0, 0.5)
    assert found.tokenizer.train_encoder
    assert (found.decoder.dtype, found.transformer.dtype) == ("float32", "auto")


def test_the_recipe_reaches_the_training(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(recipe_module, "train_model", lambda *args: calls.append(args))
    command = parse(photos, tmp_path / "run", "--holdout", "a", "--device", "cpu")
    assert command.run() == 0
    ((recipe, folder, run, device),) = calls
    assert (recipe, folder, run, str(device)) == (command.recipe, photos, tmp_path / "run", "cpu")
    assert capsys.readouterr().out == f"wrote {tmp_path / 'run' / 'model'}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "hit-huge"], "preset: expected one of ['hit-d16', 'hit-tiny'], found 'hit-huge'"),
        (
            ["--transformer.mistake-codes", "100000"],
            f"mistake_codes: expected fewer than the {CODES} codes of the preset, found 100000",
        ),
        (["--holdout", "c"], "holdout: expected stems of at least one of the 2 photos, found none"),
        ([], "holdout: expected stems of at least one of the 2 photos, found none"),
    ],
)
def test_mistakes_are_one_line(
    photos: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse(photos, tmp_path / "run", *options).run() == 2
    assert capsys.readouterr().err == f"hitsr-fast train: {message}\n"
    assert not (tmp_path / "run").exists()


def test_a_missing_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(tmp_path / "none", tmp_path / "run").run() == 2
    assert "folder: expected an existing folder" in capsys.readouterr().err


def test_missing_lpips_weights_are_said_at_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path / "empty"))
    assert parse(photos, tmp_path / "run", "--holdout", "a").run() == 2
    error = capsys.readouterr().err
    assert error.startswith("hitsr-fast train: no LPIPS weights") and "hitsr-fast weights lpips" in error


def without_perceptual_terms() -> list[str]:
    stages = ("autoencoder", "tokenizer", "decoder")
    return [word for stage in stages for term in ("alex", "vgg") for word in (f"--{stage}.loss.{term}", "0")]


def test_no_photos_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    assert parse(tmp_path / "photos", tmp_path / "run").run() == 2
    found = f"photos: expected a folder with image files, found none in {str(tmp_path / 'photos')!r}"
    assert capsys.readouterr().err == f"hitsr-fast train: {found}\n"


def test_all_photos_held_out_is_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse(photos, tmp_path / "run", "--holdout", "a", "b").run() == 2
    found = "holdout: expected photos left to train on, found all 2 held out"
    assert capsys.readouterr().err == f"hitsr-fast train: {found}\n"


@pytest.mark.filterwarnings("error")
def test_photos_smaller_than_a_crop_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (120, 20)).save(photos / f"{name}.png")
    options = ("--holdout", "a", "--device", "cpu", *without_perceptual_terms())
    assert parse(photos, tmp_path / "run", *options).run() == 2
    assert capsys.readouterr().err == (
        "hitsr-fast train: folder: expected photos of at least 128 x 128, found none among 2 in "
        f"{str(photos)!r} ({photos / 'b.png'}: 120 x 20 is smaller than a crop of 128)\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--decoder.batch", "0", "decoder.batch: expected at least 1, found 0"),
        ("--transformer.mistakes", "1.5", "transformer.mistakes: expected a value in [0, 1], found 1.5"),
        ("--tokenizer-loop.clip", "-1", "tokenizer_loop.clip: expected a value above 0, found -1.0"),
        ("--tokenizer.loss.vgg", "-1", "tokenizer.loss.vgg: expected at least 0, found -1.0"),
        ("--seed", "-1", "seed: expected at least 0, found -1"),
        ("--clean-prob", "2", "clean_prob: expected a value in [0, 1], found 2.0"),
    ],
)
def test_values_out_of_range_are_one_line(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "photos", "run", option, value])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"hitsr-fast: {message}\n"


def test_what_is_no_number_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "photos", "run", "--transformer.lr", "fast"])
    assert caught.value.code == 2
    assert "--transformer.lr" in (error := capsys.readouterr().err) and "'fast'" in error


@pytest.mark.parametrize("name", ["HITSR_FAST_BACKEND", "HITSR_FAST_CPU_ISA"])
def test_a_setting_that_is_none_is_one_line(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    if name == "HITSR_FAST_CPU_ISA":
        require("cpu")
    known = NAMES if name == "HITSR_FAST_BACKEND" else instruction_sets()
    monkeypatch.setenv(name, "abacus")
    assert parse(photos, tmp_path / "run", "--holdout", "a").run() == 2
    message = f"hitsr-fast train: {name}: expected one of {', '.join(known)}, found 'abacus'\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        FloatingPointError("decoder: the loss is nan at step 3; {}"),
        ResumeError("run/decoder.pt: was made with seed=0, not 1; resume it with the same values"),
    ],
)
def test_what_ends_a_run_is_one_line(
    error: Exception,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def end(*args: object) -> None:
        raise error

    monkeypatch.setattr(recipe_module, "train_model", end)
    assert parse(photos, tmp_path / "run", "--holdout", "a").run() == 2
    assert capsys.readouterr().err == f"hitsr-fast train: {error}\n"


def test_the_options_are_known_without_torch() -> None:
    code = "import sys, hitsr_fast.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
