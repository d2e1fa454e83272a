"""`hitsr-fast data`: what is there and what is missing, digests and manifests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hitsr_fast.cli import main
from hitsr_fast.data.presets import load_preset, preset_names
from hitsr_fast.data.sources import open_sources
from tests.data.photos_of import write


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path / "cache"))


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["data", *words])
    return int(stop.value.code or 0)


@pytest.mark.parametrize("preset", preset_names())
def test_what_is_missing_is_a_line_each(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", preset, str(tmp_path)) == 2
    lines = capsys.readouterr().out.splitlines()
    sources, expected = load_preset(preset).sources, load_preset(preset).expected
    assert len(lines) == len(sources)
    for line, source, what in zip(lines, sources, expected, strict=True):
        assert line.startswith(f"{source.name}: missing: expected {what} in {tmp_path / source.path}: ")


def test_all_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in load_preset("varsr").sources:
        for number in range(3):
            write(tmp_path / source.path / "sub" / f"{number}.png", number)
        if source.scores:
            (tmp_path / source.scores).write_text("file,score\n0.png,1\n1.png,9\n2.png,1.5\n")
    assert run("check", "varsr", str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["hr: 3 images", "spaq: 2 images"]  # the two below the threshold
    assert len(lines) == 9


def test_fewer_than_the_limit_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in load_preset("hitoksr").sources:
        write(tmp_path / source.path / "0.png", 0)
    assert run("check", "hitoksr", str(tmp_path)) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "missing" in line] == [lines[1]]
    assert lines[1].endswith(": expected 10000 images, found 1")


def test_a_source_without_scores_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.json"
    sources = [
        {"name": "a", "path": "a"},
        {"name": "b", "path": "a", "role": "negative", "scores": "b.csv", "below": 1.0},
    ]
    own.write_text(json.dumps({"sources": sources}))
    write(tmp_path / "a" / "0.png", 0)
    assert run("check", str(own), str(tmp_path)) == 2
    first, second = capsys.readouterr().out.splitlines()
    assert first == "a: 1 images"
    assert "b: missing: expected images in" in second
    assert "b.csv" in second


def test_an_unknown_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "hti", str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith("hitsr-fast data: preset: expected one of hit, ")


def test_the_digest_and_the_manifest_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "a.png", 0, 20, 32)
    (tmp_path / "in" / "b.png").touch()
    out = tmp_path / "found.json"
    assert run("manifest", str(tmp_path / "in"), "--out", str(out)) == 0
    line = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert line == f"{found['digest']}  photos: 2 images, 1 of which cannot be read\n"
    ((name, length, width, height, digest), other) = found["sources"][0]["photos"]
    assert (name, length, width, height) == ("a.png", (tmp_path / "in" / "a.png").stat().st_size, 32, 20)
    assert len(digest) == 32
    assert other[:4] == ["b.png", 0, 0, 0]


def test_the_digest_is_that_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.json"
    own.write_text(
        json.dumps({"sources": [{"name": "a", "path": "a"}, {"name": "h", "path": "h", "role": "held-out"}]})
    )
    for name in ("a", "h"):
        write(tmp_path / name / "0.png", 0)
    assert run("manifest", str(tmp_path), "--sources", str(own)) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    train, held = open_sources(tmp_path, load_preset(own).sources, holdout=None, crop=16)
    assert len(lines) == 3
    assert train.crops[0].digest == lines[0]  # type: ignore[union-attr]
    assert held.crops[0].digest == lines[1]  # type: ignore[union-attr]


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("manifest", str(tmp_path / "nowhere")) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_source_whose_scores_leave_nothing_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.json"
    negative = {"name": "n", "path": "n", "role": "negative", "scores": "n.csv", "below": 1.0}
    own.write_text(json.dumps({"sources": [{"name": "a", "path": "n"}, negative]}))
    write(tmp_path / "n" / "0.png", 0)
    (tmp_path / "n.csv").write_text("file,score\n0.png,5\n")
    assert run("check", str(own), str(tmp_path)) == 2
    first, second = capsys.readouterr().out.splitlines()
    assert first == "a: 1 images"
    assert second.endswith("expected at least one image, found 0 by the scores of n.csv")


def test_sources_that_do_not_fit_together_have_no_digest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        write(tmp_path / str(number) / "0.png", number)
        own = {"sources": [{"name": "a", "path": str(number)}]}
        (tmp_path / f"{number}.json").write_text(json.dumps(own))
    own_files = [str(tmp_path / f"{number}.json") for number in range(2)]
    assert run("manifest", str(tmp_path), "--sources", *own_files) == 2
    assert "found 'a' twice" in capsys.readouterr().err


def test_the_folder_of_a_manifest_is_made(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.png", 0)
    assert run("manifest", str(tmp_path / "in"), "--out", str(tmp_path / "new" / "deep" / "found.json")) == 0
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["found.json"]
