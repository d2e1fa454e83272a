"""The train command: a recipe, photos, a folder; every value is an option, and each end has its exit code."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hitsr_fast.backends import NAMES
from hitsr_fast.cli import main
from hitsr_fast.cli.train import split
from hitsr_fast.models import HitVar
from hitsr_fast.ops import instruction_sets
from hitsr_fast.train.artifacts import StaleError
from hitsr_fast.train.config import Recipe
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.overrides import override
from hitsr_fast.train.recipes import load_recipe
from hitsr_fast.train.task import Batch, Losses
from hitsr_fast.train.tasks import Autoencode
from tests.ops.backends import require
from tests.train.micro import write_recipe
from tests.train.photos import write_photos

PHASES = ("autoencode", "tokenize", "next_scale", "decode")


def hitsr_fast(*words: str | Path) -> int:
    """The command's exit code."""
    with pytest.raises(SystemExit) as caught:
        main([*map(str, words)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture(autouse=True)
def _no_lpips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its weights an evaluation has none of it, and takes less."""
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path / "empty"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def test_options_are_the_recipes_or_the_commands_own() -> None:
    words = "train hit-tiny photos run --seed 1 2 --device cpu --optim.lr=3 --rerun-stale --no-name x"
    assert split(words.split()) == (
        ["train", "hit-tiny", "photos", "run", "--device", "cpu", "--rerun-stale"],
        ("--seed", "1", "2", "--optim.lr=3", "--no-name", "x"),
    )


def test_print_shows_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--tokenize.optim.lr", "1e-3", "--seed", "7")
    assert hitsr_fast("train", "hit-tiny", "--print", *words) == 0
    assert Recipe.from_json(capsys.readouterr().out) == override(load_recipe("hit-tiny"), words)


def test_what_it_is_given_reaches_the_training(
    recipe: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hitsr_fast.train import run

    calls: list[tuple[object, ...]] = []

    def train(*args: object, **options: object) -> Path:
        calls.append((*args, options))
        return tmp_path / "run" / "model"

    monkeypatch.setattr(run, "train", train)
    words = ("--seed", "3", "--device", "cpu", "--rerun-stale", "--data.holdout", "a", "b")
    assert hitsr_fast("train", recipe, photos, tmp_path / "run", *words) == 0
    ((found, data, folder, options),) = calls
    assert found == override(load_recipe(recipe), ("--seed", "3", "--data.holdout", "a", "b"))
    assert (data, folder) == (photos, tmp_path / "run")
    assert options == {"device": "cpu", "rerun_stale": True}
    assert capsys.readouterr().out == f"wrote {tmp_path / 'run' / 'model'}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "hit-huge photos run",
            "recipe: expected one of hit-d16, hit-d16-tokenizer, hit-d16-v2, hit-tiny, or a JSON file, "
            "found 'hit-huge'",
        ),
        ("hit-tiny", "data: expected `hitsr-fast train RECIPE DATA RUN_FOLDER`, found none"),
        ("hit-tiny photos", "run_folder: expected `hitsr-fast train RECIPE DATA RUN_FOLDER`, found none"),
        ("hit-tiny photos run --optim.lr fast", "autoencode.optim.lr: expected a number, found 'fast'"),
        ("hit-tiny photos run --decode.batch 0", "decode.batch: expected at least 1, found 0"),
        (
            "hit-tiny photos run --sead 1",
            "--sead: no such value; nearest are --seed, --schedule.steps, --schedule.decay",
        ),
        (
            "hit-tiny photos run --model hit-huge",
            "model: expected one of hit-d16, hit-d16-11, hit-tiny, or a config.json, found 'hit-huge'",
        ),
        (
            "hit-tiny photos run --task.mistake-codes 4096",
            "next_scale.task.mistake_codes: expected fewer than the 4096 codes of the model, found 4096",
        ),
    ],
)
def test_mistakes_are_one_line(
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hitsr_fast("train", *words.split()) == 2
    assert capsys.readouterr().err == f"hitsr-fast train: {message}\n"
    assert not [*tmp_path.iterdir()]


def test_the_old_form_is_told_the_new_one(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hitsr_fast("train", photos, "run") == 2
    assert capsys.readouterr().err == (
        "hitsr-fast train: recipe: expected one of hit-d16, hit-d16-tokenizer, hit-d16-v2, hit-tiny, "
        f"or a JSON file, found the folder '{photos}'; a recipe comes before the photos now: "
        f"`hitsr-fast train hit-tiny {photos} run`\n"
    )


def test_missing_lpips_weights_are_said_at_once(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hitsr_fast("train", "hit-tiny", photos, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("hitsr-fast train: no LPIPS weights") and "hitsr-fast weights lpips" in error
    assert not (tmp_path / "run").exists()


def test_public_weights_that_are_missing_are_said_at_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--task.loss.alex", "0", "--task.loss.vgg", "0")
    assert hitsr_fast("train", "hit-d16", photos, tmp_path / "run", *words) == 2
    assert "found none at 'vae_ch160v4096z32.pth'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("side", [None, 20])
def test_photos_that_cannot_be_used_are_one_line(
    recipe: Path, tmp_path: Path, side: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b", "held") if side else ():
        Image.new("RGB", (120, side or 0)).save(photos / f"{name}.png")
    assert hitsr_fast("train", recipe, photos, tmp_path / "run", "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert error.startswith("hitsr-fast train: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["HITSR_FAST_BACKEND", "HITSR_FAST_CPU_ISA"])
def test_a_setting_that_is_none_is_one_line(
    recipe: Path,
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
    assert hitsr_fast("train", recipe, photos, tmp_path / "run") == 2
    message = f"hitsr-fast train: {name}: expected one of {', '.join(known)}, found 'abacus'\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FloatingPointError("decode: ten steps in a row"), 1),
        (StaleError("seed: run/decode was made with 0, the recipe has 1"), 2),
        (PermissionError(errno.EACCES, "Permission denied"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 28),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 28),
    ],
)
def test_each_end_has_its_line_and_code(
    error: Exception,
    code: int,
    recipe: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hitsr_fast.train import run

    def end(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(run, "train", end)
    assert hitsr_fast("train", recipe, photos, tmp_path / "run") == code
    assert capsys.readouterr().err == f"hitsr-fast train: {error}\n"


def test_of_many_processes_one_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert hitsr_fast("train", "hit-huge", "photos", "run") == 2
    assert hitsr_fast("train", "hit-tiny", "--print") == 0
    assert capsys.readouterr() == ("", "")


def test_a_recipe_end_to_end(
    recipe: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """hit-tiny's phases on a micro model: trained, taken up, refused, trained again."""
    run = tmp_path / "run"
    assert hitsr_fast("train", recipe, photos, run, "--device", "cpu") == 0
    assert f"wrote {run / 'model'}" in capsys.readouterr().out
    entries = log_of(run)
    assert [*dict.fromkeys(entry["phase"] for entry in entries)] == [*PHASES]
    first = HitVar.from_pretrained(run / "model").state_dict()
    assert all(value.isfinite().all() for value in first.values())

    assert hitsr_fast("train", recipe, photos, run, "--device", "cpu") == 0
    assert len(log_of(run)) == len(entries), "nothing was trained"

    capsys.readouterr()
    longer = ("--decode.schedule.steps", "3")
    assert hitsr_fast("train", recipe, photos, run, "--device", "cpu", *longer) == 2
    assert capsys.readouterr().err == (
        f"hitsr-fast train: decode.schedule.steps: {run / 'decode'} was made with 2, the recipe has 3; "
        "--rerun-stale trains it, and what follows it, again\n"
    )
    assert hitsr_fast("train", recipe, photos, run, "--device", "cpu", *longer, "--rerun-stale") == 0
    assert {entry["phase"] for entry in log_of(run)[len(entries) :]} == {"decode"}
    again = HitVar.from_pretrained(run / "model").state_dict()
    changed = [key for key, value in first.items() if not torch.equal(value, again[key])]
    assert changed and all(key.startswith("tokenizer.decoders.") for key in changed)


def test_a_signal_saves_and_has_a_code_of_its_own(
    recipe: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--device", "cpu", *only("autoencode"))
    assert hitsr_fast("train", recipe, photos, tmp_path / "whole", *words) == 0

    def signalled(self: Autoencode, batch: Batch, draw: Draw) -> Losses:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, draw)

    real = Autoencode.forward
    with monkeypatch.context() as patch:
        patch.setattr(Autoencode, "forward", signalled)
        assert hitsr_fast("train", recipe, photos, tmp_path / "broken", *words) == 75
    steps = [path.name for path in (tmp_path / "broken" / "autoencode" / "checkpoints").glob("step-*")]
    assert steps == ["step-00000001"] and not (tmp_path / "broken" / "model").exists()
    assert hitsr_fast("train", recipe, photos, tmp_path / "broken", *words) == 0
    models = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "broken")]
    assert models[0] == models[1]


def only(*phases: str) -> list[str]:
    """Options that leave the other phases out."""
    left = [name for name in PHASES if name not in phases]
    return [word for name in left for word in (f"--{name}.schedule.steps", "0")]


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_two_seeds_give_two_noises(recipe: Path, photos: Path, tmp_path: Path) -> None:
    """Also where both start from the same weights."""
    one = ("--device", "cpu", *only("autoencode"))
    assert hitsr_fast("train", recipe, photos, tmp_path / "0", *one) == 0
    start = f"file:{tmp_path / '0' / 'model'}"
    for seed in ("1", "2"):
        words = (*one, "--autoencode.init-from", start, "--seed", seed)
        assert hitsr_fast("train", recipe, photos, tmp_path / seed, *words) == 0
    first, second = (
        [entry["loss"] for entry in log_of(tmp_path / seed) if entry["kind"] == "step"] for seed in ("1", "2")
    )
    assert first and first != second


def torchrun(processes: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    code = ["--no-python", sys.executable, "-c", "from hitsr_fast.cli import main; main()"]
    return subprocess.run(
        [*command, *code, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parents[2],
    )


def test_two_processes_train_as_one(recipe: Path, photos: Path, tmp_path: Path) -> None:
    words = ("--device", "cpu", *only("tokenize"))
    done = torchrun(2, "train", recipe, photos, tmp_path / "two", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert hitsr_fast("train", recipe, photos, tmp_path / "one", *words) == 0
    said = [
        json.loads((tmp_path / run / "tokenize" / "artifact" / "artifact.json").read_text())
        for run in ("one", "two")
    ]
    assert said[0]["fingerprint"] == said[1]["fingerprint"]
    one, two = (
        [entry["loss"] for entry in log_of(tmp_path / run) if entry["kind"] == "step"]
        for run in ("one", "two")
    )
    assert len(one) == 2 and one == pytest.approx(two, rel=1e-3)

    refused = torchrun(2, "train", recipe, photos, tmp_path / "two", *words, "--seed", "1")
    assert refused.returncode != 0
    assert refused.stderr.count("hitsr-fast train: seed: ") == 1
