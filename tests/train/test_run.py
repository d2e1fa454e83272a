"""A run's phases: what each starts from and leaves, and that nothing stale is used or overwritten."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hitsr_fast.models import CheckpointError, HitVar
from hitsr_fast.train import artifacts, run
from hitsr_fast.train.artifacts import RunFolder, StaleError, sources
from hitsr_fast.train.config import Phase, Recipe
from hitsr_fast.train.overrides import override
from hitsr_fast.train.plan import step_flops
from hitsr_fast.train.run import load_source, train
from tests.train.micro import CONFIG, micro_recipe
from tests.train.photos import write_photos

PHASES = ("autoencode", "tokenize", "next_scale", "decode")
PARTS = {"autoencode": "tokenizer.encoder.", "tokenize": "tokenizer.", "next_scale": "transformer."}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return micro_recipe(tmp_path)


class Trained:
    """In place of training: adds to each weight of a phase's part what tells the phase and its length."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.stop_at = ""

    def __call__(self, folder: RunFolder, phase: Phase, *_: object) -> dict[str, Tensor]:
        checkpoint = folder.folder / phase.name / "checkpoints" / "step-00000001"
        checkpoint.mkdir(parents=True, exist_ok=True)
        if phase.name == self.stop_at:
            raise KeyboardInterrupt
        self.phases.append(phase.name)
        model = run.starting_model(folder, phase, CONFIG)
        part = PARTS.get(phase.name, "tokenizer.decoders.")
        state = {key: value for key, value in model.state_dict().items() if key.startswith(part)}
        return {key: value + phase.schedule.steps for key, value in state.items()}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trained]:
    fake = Trained()
    monkeypatch.setattr(run, "_trained", fake)
    yield fake


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path, phase: str) -> dict[str, Tensor]:
    return load_file(folder / phase / "artifact" / "model.safetensors")


def test_a_run_leaves_artifacts_with_digests_a_recipe_and_a_model(
    recipe: Recipe, photos: Path, tmp_path: Path, trained: Trained
) -> None:
    folder = tmp_path / "run"
    assert train(recipe, photos, folder, device="cpu") == folder / "model"
    assert trained.phases == [*PHASES]
    assert Recipe.from_json((folder / "recipe.json").read_text()) == recipe
    for name in PHASES:
        said = json.loads((folder / name / "artifact" / "artifact.json").read_text())
        assert said["phase"] == name
        assert said["digest"] == artifacts.digest_of(folder / name / "artifact" / "model.safetensors")
        assert said["fingerprint"] == artifacts.fingerprint(said["made_with"])
    made = json.loads((folder / "decode" / "artifact" / "artifact.json").read_text())["made_with"]
    assert [name for name, _ in made["init_from"]] == ["phase:tokenize", "phase:next_scale"]
    model = HitVar.from_pretrained(folder / "model")
    expected = weights(folder, "tokenize") | weights(folder, "next_scale") | weights(folder, "decode")
    state = model.state_dict()
    assert set(expected) == set(state)
    for key, value in expected.items():
        assert state[key].dtype == torch.float16 and torch.equal(state[key], value.half()), key
    assert not [path for path in folder.rglob("*") if path.suffix in (".part", ".old")]


def test_a_phase_starts_from_what_it_names_and_random_weights_of_the_seed(
    recipe: Recipe, photos: Path, tmp_path: Path, trained: Trained
) -> None:
    train(recipe, photos, tmp_path / "a", device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        random = HitVar(CONFIG).state_dict()
    encoder, tokenizer = weights(tmp_path / "a", "autoencode"), weights(tmp_path / "a", "tokenize")
    for key, value in tokenizer.items():
        assert torch.equal(value, encoder.get(key, random[key]) + 2), key
    for key, value in weights(tmp_path / "a", "next_scale").items():
        assert torch.equal(value, random[key] + 2), key


def test_two_seeds_start_from_two_models(
    recipe: Recipe, photos: Path, tmp_path: Path, trained: Trained
) -> None:
    for seed in (0, 1):
        train(replace(recipe, seed=seed), photos, tmp_path / str(seed), device="cpu")
    first, second = (weights(tmp_path / str(seed), "next_scale") for seed in (0, 1))
    assert not torch.equal(first["transformer.head.weight"], second["transformer.head.weight"])


def test_the_log_has_the_share_of_the_measured_peak(recipe: Recipe, photos: Path, tmp_path: Path) -> None:
    recipe = replace(recipe, phases=recipe.phases[:1], log=replace(recipe.log, mfu=True))
    train(recipe, photos, tmp_path / "run", device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (start,) = (line for line in lines if line["kind"] == "start")
    steps = [line for line in lines if line["kind"] == "step"]
    assert start["flops_per_step"] == step_flops(recipe, recipe.phases[0]) > 0
    assert len(steps) == recipe.phases[0].schedule.steps
    for line in steps:
        expected = start["flops_per_step"] / line["seconds_per_step"] / start["peak_flops"]
        assert line["mfu"] == pytest.approx(expected, rel=1e-5)


def test_a_finished_run_is_not_trained_again(
    recipe: Recipe, photos: Path, tmp_path: Path, trained: Trained
) -> None:
    train(recipe, photos, tmp_path / "run", device="cpu")
    before = contents(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    trained.phases.clear()
    train(recipe, photos, tmp_path / "run", device="cpu")
    assert trained.phases == []
    assert contents(tmp_path / "run") == before


def test_what_changes_no_outcome_is_free(
    recipe: Recipe, photos: Path, tmp_path: Path, trained: Trained
) -> None:
    train(recipe, photos, tmp_path / "run", device="cpu")
    words = "--data.workers 1 --data.prefetch 3 --log.every 5 --checkpoint.minutes 1 --parallel.micro-batch 2"
    trained.phases.clear()
    train(override(recipe, words.split()), photos, tmp_path / "run", device="cpu")
    assert trained.phases == []


def edit(folder: Path) -> None:
    path = folder / "tokenize" / "artifact" / "model.safetensors"
    tensors = load_file(path)
    tensors["tokenizer.quantize.codebook"] += 1
    save_file(tensors, path)


def other_photo(photos: Path) -> None:
    write_photos(photos, ("another",))


CASES: dict[str, tuple[str, Callable[[Path], None] | None, Callable[[Path], None] | None, str, list[str]]] = {
    "longer early phase": (
        "--tokenize.schedule.steps 5",
        None,
        None,
        "tokenize.schedule.steps: {run}/tokenize was made with 2, the recipe has 5",
        ["tokenize", "next_scale", "decode"],
    ),
    "no steps for a later phase": (
        "--decode.schedule.steps 0",
        None,
        None,
        "decode.schedule.steps: {run}/decode was made with 2, the recipe has 0",
        [],
    ),
    "no steps for an early phase": (
        "--autoencode.schedule.steps 0",
        None,
        None,
        "autoencode.schedule.steps: {run}/autoencode was made with 2, the recipe has 0",
        ["tokenize", "next_scale", "decode"],
    ),
    "other photos": (
        "",
        other_photo,
        None,
        "photos: {run}/autoencode was made from others (digest ",
        [*PHASES],
    ),
    "other seed": (
        "--seed 1",
        None,
        None,
        "seed: {run}/autoencode was made with 0, the recipe has 1",
        [*PHASES],
    ),
    "edited upstream": (
        "",
        None,
        edit,
        "{run}/tokenize/artifact/model.safetensors: was changed after the phase (digest ",
        ["tokenize", "next_scale", "decode"],
    ),
    "other data": (
        "--data.clean-prob 0.5",
        None,
        None,
        "data.clean_prob: {run}/autoencode was made with 0.25, the recipe has 0.5",
        [*PHASES],
    ),
    "other task": (
        "--next-scale.task.preference-beta 0.5",
        None,
        None,
        "next_scale.task.preference_beta: {run}/next_scale was made with 1.0, the recipe has 0.5",
        ["next_scale", "decode"],
    ),
    "other batch and rate": (
        "--decode.batch 2 --decode.optim.lr 1",
        None,
        None,
        "decode.batch: {run}/decode was made with 4, the recipe has 2 (and 1 more)",
        ["decode"],
    ),
    "other start": (
        "--decode.init-from phase:tokenize",
        None,
        None,
        "decode.init_from: {run}/decode was made from phase:tokenize, phase:next_scale, "
        "the recipe has phase:tokenize",
        ["decode"],
    ),
}


@pytest.mark.parametrize(
    ("words", "change_photos", "change_run", "message", "again"), CASES.values(), ids=CASES.keys()
)
def test_what_is_stale_is_refused_and_trained_again_on_demand(
    recipe: Recipe,
    photos: Path,
    tmp_path: Path,
    trained: Trained,
    words: str,
    change_photos: Callable[[Path], None] | None,
    change_run: Callable[[Path], None] | None,
    message: str,
    again: list[str],
) -> None:
    folder = tmp_path / "run"
    train(recipe, photos, folder, device="cpu")
    if change_photos:
        change_photos(photos)
    if change_run:
        change_run(folder)
    before = contents(folder)
    trained.phases.clear()
    other = override(recipe, words.split())
    with pytest.raises(StaleError) as caught:
        train(other, photos, folder, device="cpu")
    assert str(caught.value).startswith(message.format(run=folder))
    assert str(caught.value).endswith("; --rerun-stale trains it, and what follows it, again")
    assert trained.phases == [] and contents(folder) == before

    train(other, photos, folder, device="cpu", rerun_stale=True)
    assert trained.phases == again
    assert not [*folder.glob("*.stale-*")]
    if len(again) == 3:  # it is as if there had been no other run
        fresh = train(other, photos, tmp_path / "fresh", device="cpu")
        assert contents(fresh) == contents(folder / "model")


def test_a_phase_that_is_not_in_the_recipe_is_refused(
    recipe: Recipe, photos: Path, tmp_path: Path, trained: Trained
) -> None:
    folder = tmp_path / "run"
    train(recipe, photos, folder, device="cpu")
    shorter = replace(recipe, phases=recipe.phases[:-1])
    with pytest.raises(StaleError, match=r"phases: .*/decode was made, the recipe has none of that name"):
        train(shorter, photos, folder, device="cpu")
    train(shorter, photos, folder, device="cpu", rerun_stale=True)
    assert not [*folder.glob("decode*")]


def test_an_unfinished_phase_is_refused_too(
    recipe: Recipe, photos: Path, tmp_path: Path, trained: Trained
) -> None:
    trained.stop_at = "tokenize"
    with pytest.raises(KeyboardInterrupt):
        train(recipe, photos, tmp_path / "run", device="cpu")
    with pytest.raises(StaleError, match=r"tokenize\.batch: .*/tokenize was made with 4, the recipe has 8"):
        train(override(recipe, ["--tokenize.batch", "8"]), photos, tmp_path / "run", device="cpu")


def test_what_was_put_aside_stays_until_the_new_phase_is_done(
    recipe: Recipe, photos: Path, tmp_path: Path, trained: Trained
) -> None:
    folder = tmp_path / "run"
    train(recipe, photos, folder, device="cpu")
    old = contents(folder / "next_scale")
    model = contents(folder / "model")
    trained.stop_at, other = "next_scale", override(recipe, ["--tokenize.schedule.steps", "5"])
    with pytest.raises(KeyboardInterrupt):
        train(other, photos, folder, device="cpu", rerun_stale=True)
    assert {path.name for path in folder.glob("*.stale-*")} == {"next_scale.stale-1", "decode.stale-1"}
    assert contents(folder / "next_scale.stale-1") == old
    assert contents(folder / "model") == model
    trained.stop_at = ""
    trained.phases.clear()
    train(other, photos, folder, device="cpu")
    assert trained.phases == ["next_scale", "decode"]
    assert not [*folder.glob("*.stale-*")]


def test_work_from_another_outcome_of_a_lost_phase_is_refused(
    recipe: Recipe, photos: Path, tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    train(recipe, photos, folder, device="cpu")
    shutil.rmtree(folder / "tokenize")
    train(recipe, photos, folder, device="cpu")
    assert trained.phases[-1] == "tokenize", "the same comes out: what follows it is not stale"
    shutil.rmtree(folder / "tokenize")
    monkeypatch.setattr(
        run, "_trained", lambda *args: {key: value + 1 for key, value in trained(*args).items()}
    )
    with pytest.raises(StaleError, match=r"next_scale.init_from: .* was made from another phase:tokenize"):
        train(recipe, photos, folder, device="cpu")


def test_a_phase_without_steps_stands_for_what_it_starts_from(recipe: Recipe) -> None:
    other = override(recipe, ["--tokenize.schedule.steps", "0"])
    assert sources(other, other.phases[3]) == ["phase:autoencode", "phase:next_scale"]
    assert sources(recipe, recipe.phases[3]) == ["phase:tokenize", "phase:next_scale"]


@pytest.mark.parametrize("kind", ["artifact", "phase's folder", "model", "file"])
def test_a_file_is_a_start(recipe: Recipe, photos: Path, tmp_path: Path, trained: Trained, kind: str) -> None:
    source = train(replace(recipe, seed=5), photos, tmp_path / "other", device="cpu").parent
    path = {
        "artifact": source / "tokenize" / "artifact",
        "phase's folder": source / "tokenize",
        "model": source / "model",
        "file": source / "tokenize" / "artifact" / "model.safetensors",
    }[kind]
    words = ["--autoencode.schedule.steps", "0", "--tokenize.init-from", f"file:{path}"]
    changed = override(recipe, words)
    train(changed, photos, tmp_path / "run", device="cpu")
    key = "tokenizer.quantize.codebook"
    given = (
        load_file(source / "model" / "model.safetensors") if kind == "model" else weights(source, "tokenize")
    )
    assert torch.equal(weights(tmp_path / "run", "tokenize")[key], given[key].float() + 2)

    moved = Path(shutil.move(source, tmp_path / "moved"))
    words[-1] = f"file:{moved / path.relative_to(source)}"
    trained.phases.clear()
    train(override(recipe, words), photos, tmp_path / "run", device="cpu")
    assert trained.phases == [], "where the file lies does not matter"
    edit(moved) if kind != "model" else (moved / "model" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(StaleError, match=r"tokenize\.init_from: .* was made from another file:"):
        train(override(recipe, words), photos, tmp_path / "run", device="cpu")


@pytest.mark.parametrize("kind", ["file", "public"])
def test_a_missing_start_is_said_before_anything_else(
    recipe: Recipe, photos: Path, tmp_path: Path, trained: Trained, kind: str
) -> None:
    changed = override(recipe, ["--next-scale.init-from", f"{kind}:nowhere.pth"])
    with pytest.raises(ValueError, match=r"init_from: expected a file.*found none at 'nowhere\.pth'"):
        train(changed, photos, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_start_that_does_not_fit_is_named(tmp_path: Path) -> None:
    save_file(
        {"tokenizer.quantize.codebook": torch.zeros(2, 2), "other": torch.zeros(1)},
        tmp_path / "a.safetensors",
    )
    model = HitVar(CONFIG)
    before = model.tokenizer.quantize.codebook.clone()
    with pytest.raises(CheckpointError, match=r"a\.safetensors.*unexpected.*other.*mis-shaped"):
        load_source(model, f"file:{tmp_path / 'a.safetensors'}", tmp_path)
    assert torch.equal(model.tokenizer.quantize.codebook, before)
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b\.safetensors: is broken"):
        load_source(model, f"file:{tmp_path / 'b.safetensors'}", tmp_path)


@pytest.mark.parametrize("at", ["recipe.json", "phase.json", "model.safetensors", "model"])
def test_a_full_disk_leaves_nothing_half(
    recipe: Recipe, photos: Path, tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    folder = tmp_path / "run"

    def full(self: HitVar, beside: Path) -> None:
        beside.mkdir()
        (beside / "model.safetensors.tmp").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    def flushed(handle: int) -> None:
        if at in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if at == "model":
            patch.setattr(HitVar, "save_pretrained", full)
        else:
            patch.setattr(os, "fsync", flushed)
        with pytest.raises(OSError, match="No space left"):
            train(recipe, photos, folder, device="cpu")
    assert not [*folder.rglob("*.part")] and not (folder / "model").exists()
    train(recipe, photos, folder, device="cpu")
    assert (folder / "model").is_dir()
