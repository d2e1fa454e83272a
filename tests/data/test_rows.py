"""Data sets of Hugging Face's package, by a stand-in with the interface that is used of it."""

from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hitsr_fast.data.source_config import SourceConfig
from hitsr_fast.data.sources import find, open_sources
from tests.data.photos_of import picture, write


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path / "cache"))


def png(number: int, side: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(number, side, side)).save(buffer, "PNG")
    return buffer.getvalue()


class Rows:
    """A `Dataset`: rows by number, columns that are cast."""

    def __init__(self, columns: dict[str, list[Any]], fingerprint: str, read: list[int]) -> None:
        self.columns, self._fingerprint, self.read = columns, fingerprint, read
        self.column_names = list(columns)
        self.decoded = set(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, number: int) -> dict[str, Any]:
        self.read.append(number)
        return {
            name: "decoded" if name in self.decoded else cells[number] for name, cells in self.columns.items()
        }

    def cast_column(self, name: str, feature: Any) -> Rows:
        assert feature == ("Image", False)
        rows = Rows(self.columns, self._fingerprint, self.read)
        rows.decoded = self.decoded - {name}
        return rows


class Module(ModuleType):
    """The package: data sets by name and split; what was asked for, and which rows were read."""

    def __init__(self, folder: Path) -> None:
        super().__init__("datasets")
        self.read: list[int] = []
        self.asked: list[tuple[str, str | None]] = []
        write(folder / "cells" / "3.png", 3)
        images = [
            {"bytes": png(0), "path": None},
            {"bytes": png(1), "path": "folder/one.png"},
            {"bytes": png(2, 8), "path": None},
            {"bytes": None, "path": str(folder / "cells" / "3.png")},
            {"bytes": png(4)[:-50], "path": None},
            {"bytes": None, "path": str(folder / "gone.png")},
            None,
            {"bytes": png(7), "path": None},
        ]
        self.rows = Rows({"image": images, "photo": images[:1] * 8}, "f1", self.read)

    def Image(self, decode: bool) -> tuple[str, bool]:
        return "Image", decode

    def load_dataset(self, name: str, split: str) -> Rows:
        self.asked.append((name, split))
        return self.rows

    def load_from_disk(self, path: str) -> Any:
        self.asked.append((path, None))
        return {"valid": self.rows} if Path(path).name == "splits" else self.rows


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    module = Module(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_photos_are_rows(module: Module, tmp_path: Path) -> None:
    reader, photos, _ = find(SourceConfig(path="hf:some/set"), tmp_path)
    assert module.asked == [("some/set", "train")]
    assert list(photos.names) == [
        *("00000000", "00000001/one.png", "00000002", "00000003/3.png", "00000004", "00000005"),
        *("00000006", "00000007"),
    ]
    assert [photo.width for photo in photos] == [32, 32, 8, 32, 32, 0, 0, 32]
    assert [bool(photo.fault) for photo in photos] == [*[False] * 5, True, True, False]
    assert photos[5].fault == "No such file or directory"
    assert photos[6].fault == "the row has no image"
    assert reader.place(photos[1]) == "hf:some/set/00000001/one.png"
    assert reader.read(photos[0]) == png(0)


def test_crops_are_those_of_the_images(module: Module, tmp_path: Path) -> None:
    config = {"path": "hf:some/set", "limit": 5, "small": "leave out"}
    train, held = open_sources(tmp_path, [SourceConfig(**config)], holdout=("one",), crop=16)  # type: ignore[arg-type]
    assert {int(held.crop(0, "x", i, 16)[0, 0, 0]) for i in range(5)} == {1}
    crops = [train.crop(0, "x", i, 16) for i in range(60)]
    assert {int(crop[0, 0, 0]) for crop in crops} == {0, 3}
    again = pickle.loads(pickle.dumps(train))
    assert all(torch.equal(again.crop(0, "x", i, 16), crops[i]) for i in (7, 3, 50))
    (broken,) = train.skipped
    assert broken == "photos: hf:some/set/00000004"
    for number in (0, 3):
        one = next(crop for crop in crops if int(crop[0, 0, 0]) == number).permute(1, 2, 0).numpy()
        places = np.lib.stride_tricks.sliding_window_view(picture(number, 32, 32), (16, 16, 3))
        views = places.reshape(-1, 16, 16, 3)
        assert any(np.array_equal(one, view) or np.array_equal(one[:, ::-1], view) for view in views)


def test_rows_are_read_once(module: Module, tmp_path: Path) -> None:
    config = SourceConfig(path="hf:some/set", limit=4)
    photos = find(config, tmp_path).photos
    assert module.read == [0, 1, 2, 3]
    assert list(find(config, tmp_path).photos) == list(photos)
    assert module.read == [0, 1, 2, 3]
    module.rows._fingerprint = "f2"
    find(config, tmp_path)
    assert module.read == [0, 1, 2, 3] * 2


def test_it_is_the_data_of_a_run_by_itself(module: Module) -> None:
    train, held = open_sources("hf:some/set:train:image", holdout=("00000007",), crop=16)
    assert {int(held.crop(0, "x", i, 16)[0, 0, 0]) for i in range(5)} == {7}
    assert "hf:some/set:train:image/00000006" in train.skipped


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("hf:some/set", ("some/set", "train")),
        ("hf:set:valid", ("set", "valid")),
        ("hf:set:train[:100]:photo", ("set", "train[:100]")),
        ("hf:cells", ("{}/cells", "train")),  # a folder of files
        ("hf:saved", ("{}/saved", None)),
        ("hf:splits:valid", ("{}/splits", None)),
    ],
)
def test_names_splits_and_folders(
    module: Module, tmp_path: Path, path: str, asked: tuple[str, str | None]
) -> None:
    for name, file in (("saved", "state.json"), ("splits", "dataset_dict.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    photos = find(SourceConfig(path=path), tmp_path).photos
    assert module.asked == [(asked[0].format(tmp_path), asked[1])]
    assert photos[1].name == ("00000001" if path.endswith("photo") else "00000001/one.png")


def test_what_is_refused(module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"hf:set:train:label: expected one of the columns \['image', 'photo'\]"
    ):
        find(SourceConfig(path="hf:set:train:label"), tmp_path)
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").touch()
    with pytest.raises(ValueError, match=r"hf:splits: expected one of the splits \['valid'\], found 'train'"):
        find(SourceConfig(path="hf:splits"), tmp_path)
    with pytest.raises(ValueError, match=r"path: expected hf:NAME\[:SPLIT\[:COLUMN\]\], found 'hf:'"):
        find(SourceConfig(path="hf:"), tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'hf:set: it needs the package datasets: pip .*"hitsr-fast\[hf\]"'
    ):
        find(SourceConfig(path="hf:set"), tmp_path)


def test_the_package_itself(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for number in range(3):
        write(tmp_path / "files" / f"{number}.png", number)
    files = [str(tmp_path / "files" / f"{number}.png") for number in range(3)]
    table = datasets.table.InMemoryTable.from_pydict({"photo": files})
    rows = datasets.Dataset(table, fingerprint="f").cast_column("photo", datasets.Image())
    rows.save_to_disk(str(tmp_path / "saved"))
    train, held = open_sources(tmp_path, [SourceConfig(path="hf:saved:train:photo")], holdout=("1",), crop=16)
    assert {int(train.crop(0, "x", i, 16)[0, 0, 0]) for i in range(20)} == {0, 2}
    assert {int(held.crop(0, "x", i, 16)[0, 0, 0]) for i in range(5)} == {1}
