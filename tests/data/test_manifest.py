"""What is known of files: sizes by their heads, digests of heads and tails, and what is kept."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hitsr_fast.data.manifest import digest_of, index_image, photo_of, scan
from hitsr_fast.data.photo_table import Photo, PhotoTable, Strings
from hitsr_fast.imaging.io import ImageFileError, picture_size
from tests.data.photos_of import picture, write


class Counted(io.BytesIO):
    """A file that counts the bytes that are read of it."""

    count = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


def encoded(kind: str, side: int = 400, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(1, side, side + 3)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_little_of_a_file_is_read(kind: str) -> None:
    data = encoded(kind) if kind != "JPEG" else encoded(kind, 800, quality=95)
    assert len(data) > 200_000
    stream = Counted(b"before" + data + b"after")
    photo = photo_of("a", "a", 6, len(data), stream)
    assert (photo.width - photo.height, photo.fault) == (3, "")
    assert stream.count == 2 * 16384 + (65536 if kind == "BMP" else 0)


@pytest.mark.parametrize(
    "data",
    [
        encoded("TIFF", compression="tiff_lzw"),  # whose directory is at the end
        encoded("WEBP", lossless=True),
        encoded("JPEG", exif=b"Exif\0\0" + bytes(65000), icc_profile=bytes(200_000)),
    ],
    ids=["tiff", "webp", "jpeg"],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # of the cut file
def test_a_size_that_is_not_in_the_head_is_found(data: bytes) -> None:
    with pytest.raises(ImageFileError):
        picture_size(data[:65536], "a")
    photo = photo_of("a", "a", 0, len(data), io.BytesIO(data))
    assert (photo.width, photo.height, photo.fault) == (403, 400, "")


def test_a_digest_is_of_head_and_tail() -> None:
    data = bytearray(encoded("PNG"))
    middle = len(data) // 2

    def digest(changed: int, end: int | None = None) -> str:
        other = bytearray(data[:end])
        other[changed] ^= 1
        return photo_of("a", "a", 0, len(other), io.BytesIO(other)).digest

    same = photo_of("a", "a", 0, len(data), io.BytesIO(data)).digest
    assert digest(middle) == same  # which is what it can miss
    for place in (100, 16383, len(data) - 16384, len(data) - 1):
        assert digest(place) != same
    for length in (1, 1000, 32768):
        whole = photo_of("a", "a", 0, length, io.BytesIO(data)).digest
        assert all(digest(place, length) != whole for place in (0, length // 2, length - 1))


@given(length=st.integers(1, 100_000), missing=st.integers(1, 1000))
def test_a_photo_that_ends_too_soon_is_no_photo(length: int, missing: int) -> None:
    with pytest.raises(EOFError):
        photo_of("a", "a", 5, length, io.BytesIO(bytes(max(0, 5 + length - missing))))


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=9)
PHOTOS = st.builds(
    Photo,
    name=NAMES,
    file=NAMES,
    offset=st.integers(0, 2**40),
    length=st.integers(0, 2**40),
    digest=st.sampled_from(["", "0f" * 16, "a0" * 16]),
    width=st.integers(0, 2**20),
    height=st.integers(0, 2**20),
    fault=st.sampled_from(["", "broken"]),
)


@given(photos=st.lists(PHOTOS, max_size=8), more=st.lists(PHOTOS, max_size=3), data=st.data())
def test_a_table_holds_its_photos(photos: list[Photo], more: list[Photo], data: st.DataObject) -> None:
    table = PhotoTable.join([PhotoTable.of(photos), PhotoTable.of(more)])
    both = photos + more
    assert list(table) == both
    assert list(table.names) == [photo.name for photo in both]
    rows = data.draw(st.lists(st.integers(0, len(both) - 1), max_size=9)) if both else []
    assert list(table.take(np.array(rows, np.int64))) == [both[row] for row in rows]
    assert list(table[1:]) == both[1:]
    assert table.sound.tolist() == [not photo.fault for photo in both]
    assert table.shorter_sides.tolist() == [min(photo.width, photo.height) for photo in both]
    assert digest_of(table) == digest_of(reversed(both))


def test_names_need_not_be_text() -> None:
    name = os.fsdecode(b"caf\xe9.png")
    assert list(Strings.of([name, ""])) == [name, ""]
    assert Strings.of(["a", name])[-1] == name


def test_a_photo_takes_little_memory() -> None:
    table = PhotoTable.of(
        [Photo(f"{n:08}.png", f"{n:08}.png", 0, 9, "0f" * 16, 8, 8, "") for n in range(1000)]
    )
    arrays = (table.names.blob, table.names.ends, table.numbers, table.digests)
    assert table.files is table.names
    assert sum(array.nbytes for array in arrays) == 1000 * (56 + 12)


def test_what_is_known_is_kept_of_files_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hitsr_fast.data import manifest

    for number in range(4):
        write(tmp_path / f"{number}.png", number, 20 + number)
    looked: list[str] = []

    def counted(folder: Path, file: str) -> list[Photo]:
        looked.append(file)
        return index_image(folder, file)

    def scanned(*files: str) -> list[str]:
        looked.clear()
        found = scan(tmp_path, files, counted, tmp_path / "cache")
        assert list(found) == [photo for file in files for photo in index_image(tmp_path, file)]
        return sorted(looked)

    assert scanned("0.png", "1.png", "2.png") == ["0.png", "1.png", "2.png"]
    assert scanned("0.png", "1.png", "2.png") == []
    assert scanned("2.png", "0.png") == []
    assert scanned("3.png", "0.png", "gone.png") == ["3.png", "gone.png"]
    assert scanned("gone.png", "3.png", "1.png", "2.png") == ["gone.png"]
    write(tmp_path / "1.png", 9, 40)
    assert scanned("0.png", "1.png", "2.png", "3.png") == ["1.png"]
    assert scanned("0.png", "1.png", "2.png", "3.png") == []
    os.link(tmp_path / "0.png", tmp_path / "linked.png")  # of the same stamp
    assert scanned("linked.png", "1.png") == ["linked.png"]
    monkeypatch.setattr(manifest, "_FORMAT", 99)
    assert scanned("1.png") == ["1.png"]
