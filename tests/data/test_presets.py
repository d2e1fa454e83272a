"""Presets: what the papers name, and the command that says what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hitsr_fast.data.presets import Preset, load_preset, preset_names, sources_of
from hitsr_fast.data.source_config import SourceConfig
from hitsr_fast.train.config import DataConfig, Recipe
from hitsr_fast.train.overrides import override


def by_name(preset: str) -> dict[str, SourceConfig]:
    return {source.name: source for source in load_preset(preset).sources}


def test_the_presets() -> None:
    assert preset_names() == ["hit", "hit-tokenizer", "hitoksr", "varsr"]
    for name in preset_names():
        preset = load_preset(name)
        assert len(preset.expected) == len(preset.sources)
        assert DataConfig(sources=preset.sources).sources == preset.sources
        assert Preset.from_json(preset.to_json()) == preset
        assert [source.name for source in preset.sources if source.role == "held-out"] == ["div2k-valid"]
        assert all(source.sharpness_db is None and not source.turns for source in preset.sources)


def test_hit_trains_on_five_sets_of_which_ten_thousand_faces() -> None:
    sources = by_name("hit")
    assert list(sources) == ["div2k", "div8k", "flickr2k", "ost", "ffhq", "div2k-valid"]
    assert {name: source.limit for name, source in sources.items() if source.limit} == {"ffhq": 10_000}
    assert next(source.path for source in load_preset("hit-tokenizer").sources) == "OpenImages/train"


def test_hitoksr_trains_on_lsdir_and_ten_thousand_faces() -> None:
    sources = by_name("hitoksr")
    assert list(sources) == ["lsdir", "ffhq", "div2k-valid"]
    assert sources["ffhq"].limit == 10_000


def test_varsr_trains_on_centres_and_on_negatives_by_score() -> None:
    sources = by_name("varsr")
    hr = sources.pop("hr")
    assert (hr.cut, hr.shorter_side, hr.centre, hr.flip, hr.turns) == ("resize-centre", 640, 512, True, False)
    del sources["div2k-valid"]
    assert {source.role for source in sources.values()} == {"negative"}
    assert {(source.cut, source.shorter_side, source.centre) for source in sources.values()} == {
        ("resize-centre", 512, 512)
    }
    assert {name: source.below_share for name, source in sources.items()} == {
        "spaq": 0.4,
        "koniq": 0.6,
        "clive": 0.6,
        "kadid": 0.6,
        "flive": 0.6,
        "flive-patches": 0.5,
        "ava": 0.32,
    }


def test_a_preset_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"sources": [{"name": "mine", "path": "mine", "weight": 2.0}]}))
    assert sources_of([str(own)])[0] == SourceConfig(name="mine", path="mine", weight=2.0)
    own.write_text(json.dumps({"sources": [{"name": "mine", "size": 3}]}))
    with pytest.raises(ValueError, match=r"own\.json: .*unknown keys \['size'\]"):
        load_preset(own)
    with pytest.raises(ValueError, match=r"preset: expected one of hit, hit-tokenizer, .*found 'nothing'"):
        load_preset("nothing")
    own.write_text(json.dumps({"expected": ["a"], "sources": []}))
    with pytest.raises(ValueError, match="expected a text a source, found 1 for 0"):
        load_preset(own)


def test_a_recipe_takes_presets_by_name_and_sources_in_full() -> None:
    recipe = override(Recipe(), ["--data.sources", "hit-tokenizer"])
    assert recipe.data.sources == load_preset("hit-tokenizer").sources
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert override(recipe, ["--data.sources"]).data.sources == ()
    with pytest.raises(ValueError, match=r"data\.sources: preset: expected one of hit"):
        override(Recipe(), ["--data.sources", "hti"])


def test_what_presets_have_alike_is_there_once() -> None:
    both = override(Recipe(), ["--data.sources", "hit", "hitoksr"]).data.sources
    names = [source.name for source in both]
    assert names == ["div2k", "div8k", "flickr2k", "ost", "ffhq", "div2k-valid", "lsdir"]
    assert both == sources_of(["hit", "hitoksr"])
    with pytest.raises(ValueError, match="found 'div2k-valid' twice"):  # which VARSR cuts otherwise
        sources_of(["hit", "varsr"])
