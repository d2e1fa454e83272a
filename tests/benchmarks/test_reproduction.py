"""The small reproduction of the paper: its page has its file's figures, and its runs differ as it says."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.reproduction.__main__ import TOKENIZER, recipes
from benchmarks.reproduction.scores import RESULTS, Row, held_out_pairs, read_rows, write_rows
from benchmarks.reproduction.tables import ORDERINGS, tables
from hitsr_fast.train.config import Recipe
from hitsr_fast.train.model import model_config
from tests.train.micro import CONFIG
from tests.train.photos import write_photos

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> tuple[Recipe, Recipe]:
    """The recipes of hierarchical and of plain tokens."""
    monkeypatch.chdir(ROOT)
    (hit, folder), (plain, beside) = recipes(Path("runs"), 5)
    assert hit.seed == plain.seed == 5 and folder != beside
    return hit, plain


def test_the_page_has_the_tables_of_the_file() -> None:
    rows = read_rows(RESULTS)
    assert {row.seed for row in rows} == {0, 1, 2}
    assert tables(rows).strip() in (ROOT / "docs" / "reproduction.md").read_text()


def test_methods_differ_in_what_they_are_named_for(pair: tuple[Recipe, Recipe]) -> None:
    hit, plain = pair
    configs = [asdict(model_config(recipe)) for recipe in pair]
    for config in configs:
        config.pop("name")
    assert configs[0] != configs[1]
    configs[1]["transformer"]["ar_grid"] = "target"
    assert configs[0] == configs[1]
    assert replace(hit, name="", model="", phases=()) == replace(plain, name="", model="", phases=())
    phases = {phase.name: phase for phase in (*hit.phases, *plain.phases)}
    first = phases["hit"]
    for name, tokens, preference in (
        ("hit-preference", True, 1.0),
        ("var", False, 0.0),
        ("var-preference", False, 1.0),
    ):
        task = replace(first.task, hierarchical=tokens, preference=preference)  # type: ignore[call-arg]
        assert replace(phases[name], name="hit", init_from=first.init_from, task=first.task) == first
        assert phases[name].task == task
        assert phases[name].init_from[0].split(":", 1)[1].endswith((TOKENIZER, f"{TOKENIZER}/artifact"))


def test_plain_tokens_on_the_grids_of_targets_are_refused(pair: tuple[Recipe, Recipe]) -> None:
    hit, plain = pair
    with pytest.raises(ValueError, match=r"^var\.task\.hierarchical: expected true, or .*ar_grid 'full'"):
        model_config(replace(plain, model=hit.model))


def test_orderings_are_counted_in_the_papers_direction() -> None:
    rows = []
    for seed, gain in enumerate((1.0, 2.0, -1.0)):
        for table, worse, better in ORDERINGS:
            rows += [
                Row(table, worse, 32, seed, 20.0, 0.5),
                Row(table, better, 32, seed, 20 + gain, 0.5 - gain / 10),
            ]
    rows = list({(row.table, row.method, row.seed): row for row in rows}.values())
    text = tables(rows)
    assert "| 1a | hierarchical over plain* | psnr_y | 32 | 2 of 3 | +0.67 |" in text
    assert "| 1a | hierarchical over plain* | lpips | 32 | 2 of 3 | -0.067 |" in text
    assert "| hierarchical | 20.67 ± 1.53 | 0.433 ± 0.153 |" in text


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [Row("2", "hit", 64, 1, 21.5, 0.25)]
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv") == rows


def test_crops_are_the_same_for_every_run(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    first, second = (held_out_pairs(CONFIG, photos, 3) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.equal(b) and len(a) == 3
