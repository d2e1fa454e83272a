"""Runs on several sources: the same samples however they are made, what the log has, what is stale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hitsr_fast.data.source_config import SourceConfig
from hitsr_fast.data.sources import Sources, open_sources
from hitsr_fast.train.artifacts import StaleError, made_with
from hitsr_fast.train.config import Recipe
from hitsr_fast.train.overrides import override
from hitsr_fast.train.run import train
from tests.train.micro import micro_recipe
from tests.train.photos import write_photos
from tests.train.test_data import by_index, loader, same


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_photos(tmp_path / "data" / "good", ("a", "b", "c"), 64)
    write_photos(tmp_path / "data" / "bad", ("d", "e"), 24)
    write_photos(tmp_path / "data" / "valid", ("f",), 64)
    return tmp_path / "data"


SOURCES = (
    SourceConfig(name="good", path="good", weight=2.0),
    SourceConfig(name="bad", path="bad", weight=1.0, role="negative"),
    SourceConfig(name="valid", path="valid", role="held-out"),
)


def opened(root: Path) -> Sources:
    source = open_sources(root, SOURCES, holdout=None, crop=32)[0]
    assert isinstance(source, Sources)
    return source


def test_samples_do_not_depend_on_processes_workers_micro_batches_and_where_a_run_resumes(root: Path) -> None:
    source = opened(root)
    whole = by_index(loader(source), steps=(0, 4))
    assert sorted(whole) == list(range(32))
    parts = [
        by_index(loader(opened(root), workers=workers), steps=steps)
        for workers, steps in ((0, (0, 2)), (1, (2, 4)))
    ]
    assert same(whole, parts[0] | parts[1])
    ranks = [loader(opened(root), micro=2, rank=rank, world=2, workers=1) for rank in range(2)]
    assert same(whole, by_index(*ranks, steps=(0, 4)))
    labels = [source.label_of(0, "phase", index) for index in range(32)]
    assert 0 < sum(labels) < 32


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_breaks_in_a_source_is_named_once(
    root: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    photo = root / "good" / "b.png"
    photo.write_bytes(photo.read_bytes()[:-600])
    (root / "bad" / "empty.png").touch()
    each = loader(opened(root), workers=workers)
    by_index(each, steps=(0, 4))
    lines = capfd.readouterr().err.splitlines()
    assert sorted(line.partition(root.name)[0] for line in lines) == [
        f"hitsr-fast train: photo left out: {name}: {root.parent}/" for name in ("bad", "good")
    ]
    assert len(each.skipped) == 2


TRAINED = (SOURCES[0], replace(SOURCES[1], role="train"), SOURCES[2])


def one_phase(tmp_path: Path) -> Recipe:
    recipe = micro_recipe(tmp_path)
    return replace(recipe, phases=recipe.phases[:1], data=replace(recipe.data, sources=TRAINED, holdout=None))


def test_a_run_does_not_train_towards_images_of_low_quality(root: Path, tmp_path: Path) -> None:
    recipe = one_phase(tmp_path)
    recipe = replace(recipe, data=replace(recipe.data, sources=SOURCES))
    with pytest.raises(
        ValueError, match=r"data\.sources: .*'bad' is of role negative, which no task of this"
    ):
        train(recipe, root, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_run_says_what_it_draws_from(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(one_phase(tmp_path), root, tmp_path / "run", device="cpu")
    assert capsys.readouterr().out.splitlines()[:2] == ["good: 3 images", "bad: 2 images, 2 enlarged"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (line,) = (line for line in lines if line["kind"] == "data")
    assert line["sources"]["bad"] == {"images": 2, "enlarged": 2, "too small": 0, "fault": 0}
    assert any(line["kind"] == "held_out" for line in lines)
    assert Recipe.from_json((tmp_path / "run" / "recipe.json").read_text()).data.sources == TRAINED


def test_other_sources_make_a_phase_stale(root: Path, tmp_path: Path) -> None:
    recipe = one_phase(tmp_path)
    train(recipe, root, tmp_path / "run", device="cpu")
    train(override(recipe, ["--data.memory-mib", "9"]), root, tmp_path / "run", device="cpu")
    heavier = (replace(TRAINED[0], weight=9.0), *TRAINED[1:])
    with pytest.raises(StaleError, match=r"data\.sources: .* was made with .*; --rerun-stale"):
        train(
            replace(recipe, data=replace(recipe.data, sources=heavier)), root, tmp_path / "run", device="cpu"
        )
    write_photos(root / "good", ("g",), 64)
    with pytest.raises(StaleError, match=r"photos: .* was made from others"):
        train(recipe, root, tmp_path / "run", device="cpu")


def test_without_sources_a_phase_is_made_with_what_it_was_before_there_were_any(tmp_path: Path) -> None:
    recipe = micro_recipe(tmp_path)
    assert "sources" not in made_with(recipe, recipe.phases[0], {}, "", [])["data"]
    listed = one_phase(tmp_path)
    assert made_with(listed, listed.phases[0], {}, "", [])["data"]["sources"][0]["name"] == "good"
