"""The train command: every value of a recipe is an option, mistakes are one clear line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from PIL import Image

from hitsr_fast.cli.train import Train
from hitsr_fast.train import recipe as recipe_module
from hitsr_fast.train.config import Recipe


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
    )
    found = command.recipe
    assert (found.seed, found.holdout) == (3, ("a", "b"))
    assert (found.transformer.lr, found.decoder_loop.steps, found.tokenizer.loss.vgg) == (0.1, 0, 0.5)
    assert found.tokenizer.train_encoder


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


def test_a_lost_loss_is_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(*args: object) -> None:
        raise FloatingPointError("decoder: the loss is nan at step 3; {}")

    monkeypatch.setattr(recipe_module, "train_model", diverge)
    assert parse(photos, tmp_path / "run", "--holdout", "a").run() == 2
    assert capsys.readouterr().err == "hitsr-fast train: decoder: the loss is nan at step 3; {}\n"


def test_the_options_are_known_without_torch() -> None:
    code = "import sys, hitsr_fast.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
