"""Several sources as one: which sample is of which, limits, what is held out, scores."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hitsr_fast.data.crops import NoPhotosError, PhotoCrops
from hitsr_fast.data.source_config import PLAIN, SourceConfig
from hitsr_fast.data.sources import Sources, describe, open_sources
from tests.data.photos_of import write


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """a: images 0 to 7, b: 100 and 101, valid: 200."""
    for number in range(8):
        write(tmp_path / "root" / "a" / f"{number}.png", number)
    for number in (100, 101):
        write(tmp_path / "root" / "b" / f"{number}.png", number)
    write(tmp_path / "root" / "valid" / "200.png", 200)
    return tmp_path / "root"


VALID: dict[str, Any] = {"name": "valid", "role": "held-out"}


def opened(
    root: Path, *configs: dict[str, Any], holdout: tuple[str, ...] | None = None
) -> tuple[Sources, Sources]:
    configs_ = [SourceConfig(**{"path": config["name"], **config}) for config in configs]
    train, held = open_sources(root, configs_, holdout=holdout, crop=16)
    assert isinstance(train, Sources)
    assert isinstance(held, Sources)
    return train, held


def reds(source: Sources | PhotoCrops, count: int = 400) -> list[int]:
    """Of some samples the numbers of their images."""
    return [int(source.crop(0, "x", i, 16)[0, 0, 0]) for i in range(count)]


def test_all_images_of_all_sources_alike_without_weights(root: Path) -> None:
    train, held = opened(root, {"name": "a"}, {"name": "b"}, VALID)
    found = reds(train, 1000)
    assert set(found) == {*range(8), 100, 101}
    assert 0.16 < np.mean(np.array(found) >= 100) < 0.24
    assert set(reds(held, 20)) == {200}


def test_weights_are_shares_of_the_samples(root: Path) -> None:
    train, _ = opened(root, {"name": "a", "weight": 1.0}, {"name": "b", "weight": 3.0}, VALID)
    assert 0.69 < np.mean(np.array(reds(train, 1000)) >= 100) < 0.81


def test_a_sample_is_a_function_of_its_key(root: Path) -> None:
    configs = ({"name": "a", "weight": 1.0}, {"name": "b", "weight": 1.0, "role": "negative"}, VALID)
    train, again = opened(root, *configs)[0], pickle.loads(pickle.dumps(opened(root, *configs)[0]))
    for index in (5, 3, 10**12, 4):
        number = train.source_of(1, "x", index)
        crop = train.crop(1, "x", index, 16)
        assert torch.equal(crop, again.crop(1, "x", index, 16))
        assert number == again.source_of(1, "x", index) == int(crop[0, 0, 0] >= 100)
        assert torch.equal(crop, train.crops[number].crop(1, "x", index, 16))
        assert train.label_of(1, "x", index) == number  # the second is the negative one
    chosen = [train.source_of(1, "x", i) for i in range(64)]
    assert chosen != [train.source_of(2, "x", i) for i in range(64)]
    assert chosen != [train.source_of(1, "y", i) for i in range(64)]


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5), index=st.integers(0, 2**63))
def test_a_source_is_always_one_of_them(weights: list[float], index: int) -> None:
    sources = Sources.__new__(Sources)
    sources._shares = np.cumsum(weights) / np.cumsum(weights)[-1]
    assert 0 <= sources.source_of(0, "x", index) < len(weights)


def test_a_source_by_the_rules_of_a_plain_folder_gives_its_crops(root: Path) -> None:
    plain, held = open_sources(root / "a", holdout=("3",), crop=16)
    values = {name: getattr(PLAIN, name) for name in ("draw", "turns", "small", "sharpness_db")}
    listed, listed_held = opened(root, {"name": "a", **values}, holdout=("3",))
    assert reds(held, 5) == reds(listed_held, 5) == [3] * 5
    for index in range(20):
        assert torch.equal(plain.crop(0, "x", index, 16), listed.crop(0, "x", index, 16))


def test_the_first_images_by_name(root: Path) -> None:
    train, _ = opened(root, {"name": "a", "limit": 3}, VALID)
    assert set(reds(train)) == {0, 1, 2}


def test_what_is_held_out(root: Path) -> None:
    train, held = opened(root, {"name": "a"}, {"name": "b"})  # every sixteenth of a/0, ..., b/101
    assert set(reds(held)) == {0}
    assert set(reds(train)) == {*range(1, 8), 100, 101}
    train, held = opened(root, {"name": "a"}, {"name": "b"}, VALID, holdout=("7", "101"))
    assert set(reds(held)) == {7, 101, 200}
    assert set(reds(train)) == {*range(7), 100}
    train, held = opened(root, {"name": "a"}, {"name": "b", "role": "negative"}, holdout=("7",))
    assert set(reds(held)) == {7}
    with pytest.raises(NoPhotosError, match=r"found none of 101"):  # negatives are not held out
        opened(root, {"name": "a"}, {"name": "b", "role": "negative"}, holdout=("101",))


def test_counts_are_a_line_a_source(root: Path) -> None:
    write(root / "a" / "small.png", 9, 8, 8)
    (root / "b" / "broken.png").touch()
    train, _ = opened(root, {"name": "a"}, {"name": "b", "small": "leave out"}, VALID)
    assert train.counts["a"] == {"images": 9, "enlarged": 1, "too small": 0, "fault": 0}
    assert describe(train.counts) == ["a: 9 images, 1 enlarged", "b: 2 images, 1 fault"]
    write(root / "b" / "small.png", 9, 8, 8)
    train, _ = opened(root, {"name": "b", "small": "leave out"}, VALID)
    assert describe(train.counts) == ["b: 2 images, 1 too small, 1 fault"]
    assert train.newly_skipped() == {f"b: {root / 'b' / 'broken.png'}": "the file is empty"}
    assert train.newly_skipped() == {}


def test_a_photo_that_breaks_is_known_to_all_and_moves_no_sample_to_another_source(root: Path) -> None:
    write(root / "a" / "7.png", 7)
    (root / "a" / "7.png").write_bytes((root / "a" / "7.png").read_bytes()[:-100])
    train, _ = opened(root, {"name": "a"}, {"name": "b"}, VALID)
    chosen = [train.source_of(0, "x", index) for index in range(100)]
    assert [int(red >= 100) for red in reds(train, 100)] == chosen
    assert list(train.skipped) == [f"a: {root / 'a' / '7.png'}"]
    assert train.crops[1].skipped is train.skipped


def test_paths_are_below_the_root_or_absolute(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "0.png", 50)
    train, _ = opened(root, {"name": "a", "path": str(tmp_path / "elsewhere")}, {"name": "b"}, VALID)
    assert set(reds(train)) == {50, 100, 101}
    with pytest.raises(ValueError, match=r"found nothing at '.*root/nowhere'"):
        opened(root, {"name": "nowhere"}, VALID)


def test_the_digest_is_of_names_of_sources_and_their_photos(root: Path) -> None:
    digests = [
        opened(root, *configs, VALID)[0].digest
        for configs in (
            ({"name": "a"},),
            ({"name": "a"}, {"name": "b"}),
            ({"name": "b"}, {"name": "a"}),
            ({"name": "a", "limit": 7}, {"name": "b"}),
            ({"name": "c", "path": "a"}, {"name": "b"}),
        )
    ]
    assert digests[1] == digests[2]
    assert len(set(digests)) == 4


def scored(root: Path, text: str) -> None:
    (root / "scores.csv").write_text(text, encoding="utf-8", errors="surrogateescape")


LINES = "file,score,by\n0.png,1,x\n1,2,x\na/2.png,3.5,x\n3.png,9,x\n4.png,11,x\nother.png,5,x\n"


@pytest.mark.parametrize(
    ("values", "negatives", "others"),
    [
        ({"below": 3.5}, {0, 1}, {2, 3, 4}),
        ({"below_share": 0.25}, {0, 1}, {2, 3, 4}),  # 1 + 0.25 * (11 - 1) = 3.5
        ({"below_share": 0.26}, {0, 1, 2}, {3, 4}),
    ],
)
def test_images_of_low_quality_by_their_scores(
    root: Path, values: dict[str, Any], negatives: set[int], others: set[int]
) -> None:
    """Names are paths in the source, file names or stems; what has no score is of neither kind."""
    scored(root, LINES)
    source = {"name": "a", "path": ".", "scores": "scores.csv", **values}
    train, _ = opened(root, source, VALID)
    assert set(reds(train)) == others
    assert train.counts["a"]["left out by score"] == 11 - len(others)
    train, _ = opened(root, {"name": "b"}, {**source, "role": "negative"}, VALID)
    found = set(reds(train)) - {100, 101}
    assert found == negatives
    assert [train.label_of(0, "x", i) for i in range(400)] == [int(red < 100) for red in reds(train)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,score\n", r"scores\.csv: expected a column 'file', found name, score"),
        ("file,score\n", "expected scores of images, found none"),
        ("file,score\n0.png,good\n", "expected a number in line 2, found 'good'"),
        ("file,score\n0.png,nan\n", "expected a number in line 2, found 'nan'"),
        ("file,score\n0.png\n", "expected a number in line 2, found ''"),
        ("score,file\n1\n", r"scores\.csv: expected the name of an image in line 2, found none"),
        pytest.param(
            'file,score\n"0.png,1\n' + "x" * 200_000,
            r"scores\.csv: expected a CSV file in UTF-8: field larger",
            id="a quote that does not end",
        ),
        pytest.param(
            "file,score\nch\udce2teau.png,1\n",
            r"scores\.csv: expected a CSV file in UTF-8: .*invalid continuation byte",
            id="Latin-1",
        ),
        ("file,score\n0.png,1\n0.png,2\n", r"expected one score of '0\.png', found 1\.0 and 2\.0"),
        ("file,score\nzebra.png,1\n", r"expected scores of images like '0\.png', found 'zebra\.png'"),
    ],
)
def test_scores_that_cannot_be_used(root: Path, text: str, message: str) -> None:
    scored(root, text)
    with pytest.raises(ValueError, match=message):
        opened(root, {"name": "a", "scores": "scores.csv", "below": 3.0}, VALID)


def test_scores_that_are_not_there(root: Path) -> None:
    with pytest.raises(ValueError, match=r"scores: expected a CSV file, found No such file .*none\.csv"):
        opened(root, {"name": "a", "scores": "none.csv", "below": 3.0}, VALID)


def test_columns_by_name(root: Path) -> None:
    scored(root, "\ufeffimage,MOS\n0.png,1\n1.png,5\n")
    names = {"scores": "scores.csv", "score_file": "image", "score": "MOS", "below": 3.0}
    train, _ = opened(root, {"name": "a", **names}, VALID)
    assert set(reds(train, 20)) == {1}


def test_a_source_without_images_names_itself(root: Path) -> None:
    with pytest.raises(NoPhotosError, match=r"^a: photos: expected some of at least 16 x 16"):
        opened(
            root,
            {"name": "a", "small": "leave out", "path": "tiny"} | written_small(root),
            {"name": "b"},
            VALID,
        )
    with pytest.raises(ValueError, match=r"^a\.centre: expected the 16"):
        opened(root, {"name": "a", "cut": "resize-centre"}, VALID)


def written_small(root: Path) -> dict[str, Any]:
    write(root / "tiny" / "a.png", 1, 8, 8)
    return {}
