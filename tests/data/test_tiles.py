"""Sub-images: their places and names, what is done already, what is left of a run that did not end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hitsr_fast.data.crops import NoPhotosError
from hitsr_fast.data.folder import photo_names
from hitsr_fast.data.manifest import digest_of, index_image, scan
from hitsr_fast.data.tiles import Cut, cut_photos, starts
from tests.data.photos_of import write


@given(length=st.integers(1, 3000), size=st.integers(8, 600), share=st.floats(0.01, 1))
def test_sub_images_cover_a_side_by_equal_steps_and_end_with_it(length: int, size: int, share: float) -> None:
    step = max(1, int(size * share))
    found = starts(length, size, step)
    assert found[0] == 0
    assert found[-1] == max(0, length - size)
    gaps = np.diff(found)
    assert (gaps[:-1] == step).all()
    assert (gaps > 0).all()
    assert (gaps <= step).all()


def cut(source: Path, target: Path, size: int = 16, step: int = 8) -> dict[str, Cut]:
    return {done.name: done for done in cut_photos(source, target, size=size, step=step)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write(tmp_path / "in" / "a.png", 1, 20, 33)
    write(tmp_path / "in" / "sub" / "b.jpg", 2, 16, 10)
    return tmp_path / "in"


def test_names_places_and_pixels(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    done = cut(source, target)
    names = [f"a_s{number:03}.png" for number in range(1, 9)]
    assert done["a.png"] == Cut("a.png", names, "", made=True)
    assert photo_names(target) == [*names, "sub/b_s001.png"]
    pixels = np.asarray(Image.open(source / "a.png"))
    places = [(top, left) for top in (0, 4) for left in (0, 8, 16, 17)]
    for name, (top, left) in zip(names, places, strict=True):
        assert np.array_equal(np.asarray(Image.open(target / name)), pixels[top : top + 16, left : left + 16])
    small = np.asarray(Image.open(target / "sub" / "b_s001.png"))
    assert np.array_equal(small, np.asarray(Image.open(source / "sub" / "b.jpg")))


def test_the_manifest_says_what_was_made_of_what(source: Path, tmp_path: Path) -> None:
    cut(source, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["size"], manifest["step"]) == (16, 8)
    for name, folder in (("source_digest", source), ("digest", tmp_path / "out")):
        assert manifest[name] == digest_of(scan(folder, photo_names(folder), index_image))
    assert [(entry["file"], len(entry["crops"])) for entry in manifest["photos"]] == [
        ("a.png", 8),
        ("sub/b.jpg", 1),
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".png") == [
        "manifest.json",
        "sub",
    ]


def test_what_is_there_is_not_cut_again(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    cut(source, target)
    before = (target / "manifest.json").read_bytes()
    assert not any(done.made for done in cut(source, target).values())
    assert (target / "manifest.json").read_bytes() == before
    (target / "a_s003.png").unlink()
    assert {name: done.made for name, done in cut(source, target).items()} == {
        "a.png": True,
        "sub/b.jpg": False,
    }
    write(source / "a.png", 3, 20, 33)
    assert {name: done.made for name, done in cut(source, target).items()} == {
        "a.png": True,
        "sub/b.jpg": False,
    }
    assert np.asarray(Image.open(target / "a_s001.png"))[0, 0, 0] == 3
    assert all(done.made for done in cut(source, target, step=16).values())
    assert photo_names(target) == [*(f"a_s{number:03}.png" for number in range(1, 7)), "sub/b_s001.png"]


def test_a_run_that_did_not_end_goes_on(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    run = cut_photos(source, target, size=16, step=8, workers=1)
    first = next(run)
    run.close()
    assert not (target / "manifest.json").exists()
    with (target / ".manifest.partial.jsonl").open("a") as journal:
        journal.write('{"file": "sub/b.jp')  # as if it was killed there
    done = cut(source, target)
    assert first.made
    assert not done[first.name].made
    assert (target / "manifest.json").exists()
    assert not any(path.name.startswith(".") for path in target.iterdir())


def test_a_photo_that_cannot_be_read_is_named_and_tried_again(source: Path, tmp_path: Path) -> None:
    whole = (source / "a.png").read_bytes()
    (source / "a.png").write_bytes(whole[:-100])
    (source / "empty.png").touch()
    done = cut(source, tmp_path / "out")
    assert "truncated" in done["a.png"].fault
    assert done["empty.png"].fault == "the file is empty"
    assert done["sub/b.jpg"].made
    (source / "a.png").write_bytes(whole)
    assert cut(source, tmp_path / "out")["a.png"].made


def test_what_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step: expected an integer from 1 to size = 16, found 17"):
        cut(source, tmp_path / "out", step=17)
    with pytest.raises(ValueError, match="nowhere"):
        cut(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "none").mkdir()
    with pytest.raises(NoPhotosError, match="found none in"):
        cut(tmp_path / "none", tmp_path / "out")
    write(source / "a.jpg", 1)
    with pytest.raises(ValueError, match=r"names of their own before the suffix, found a\.jpg and a\.png"):
        cut(source, tmp_path / "out")


@pytest.mark.parametrize(
    "text", ["[]", '{"photos": [{}]}', '{"photos": [3]}', '{"photos": [{"file": []}]}', "{"]
)
def test_a_manifest_of_something_else_is_refused(source: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json: expected a manifest of this command"):
        cut(source, tmp_path / "out")


def test_sub_images_of_a_photo_that_is_gone_are_removed(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    cut(source, target)
    (source / "a.png").unlink()
    cut(source, target)
    assert photo_names(target) == ["sub/b_s001.png"]
    cut(source, tmp_path / "fresh")
    assert (target / "manifest.json").read_bytes() == (tmp_path / "fresh" / "manifest.json").read_bytes()
    write(source / "sub" / "b.png", 9, 16, 10)  # whose sub-image has the name of that of the one before
    (source / "sub" / "b.jpg").unlink()
    cut(source, target)
    assert photo_names(target) == ["sub/b_s001.png"]
    assert np.asarray(Image.open(target / "sub" / "b_s001.png"))[0, 0, 0] == 9


def test_neither_folder_is_in_the_other(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    for first, second in (
        (source, source),
        (source, source / "cut"),
        (source / "sub", source),
        (source, tmp_path / "link"),
        (source, source / "sub" / ".."),
    ):
        with pytest.raises(ValueError, match=r"target: expected a folder apart from the photos', found '"):
            cut(first, second)
    assert photo_names(source) == ["a.png", "sub/b.jpg"]


def test_a_target_that_is_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    write(tmp_path / "file.png", 1)
    for target in (tmp_path / "file.png", tmp_path / "file.png" / "out"):
        with pytest.raises(
            ValueError, match=r"target: expected a folder, or none yet, found a file at or above"
        ):
            cut(source, target)
