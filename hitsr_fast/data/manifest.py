"""What a set of photos holds: each photo's place, size and digest, found once and kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from hitsr_fast.data.photo_table import Photo, PhotoTable, Strings
from hitsr_fast.files import write_whole
from hitsr_fast.imaging.io import MAX_PIXELS, ImageFileError, picture_size

__all__ = ["Photo", "PhotoTable", "digest_of", "index_image", "photo_of", "scan", "write_manifest"]

_FORMAT: Final = 2
_END: Final = 16384  # bytes at either end of a photo that its digest is of
_HEAD: Final = 65536  # bytes in which the size of nearly every photo stands, after a thumbnail
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of JPEG that a size follows
_TIFF: Final = (b"II*\0", b"MM\0*")  # whose size stands anywhere
_READERS, _AT_ONCE = 8, 4096  # threads that look into files, and files that they get at a time

Index = Callable[[Path, str], list[Photo]]
"""The photos in a file of a folder."""


def photo_of(name: str, file: str, offset: int, length: int, stream: BinaryIO) -> Photo:
    """The entry of a photo that begins at `offset` of a stream.

    Its digest is BLAKE2b, of 128 bits, of its first and last 16384 bytes, one after the other: of all of them
    where it has no more than 32768. Its size is read from its first 16384 bytes, where it does not stand
    there from the first 65536, and where not there either, or of a TIFF file, from all of them.

    Raises:
        OSError: The stream cannot be read.
        EOFError: It ends before the photo does.
    """
    head = _part(stream, offset, min(length, _END))
    rest = max(0, length - _END)
    tail = _part(stream, offset + length - min(rest, _END), min(rest, _END))
    digest = hashlib.blake2b(head + tail, digest_size=16).hexdigest()
    photo = Photo(name, file, offset, length, digest, 0, 0, "")
    size = head_size(head)
    if size is not None:
        return photo._replace(width=size[0], height=size[1])
    if length > _HEAD and head[:4] not in _TIFF:
        photo = _sized(photo, _part(stream, offset, _HEAD))
        if not photo.fault:
            return photo
    return _sized(photo, _part(stream, offset, length))


def index_image(folder: Path, file: str) -> list[Photo]:
    """An image file is one photo, even if it is broken or gone."""
    try:
        with open(os.path.join(folder, file), "rb") as stream:
            return [photo_of(file, file, 0, os.fstat(stream.fileno()).st_size, stream)]
    except OSError as error:
        return [Photo(file, file, 0, 0, "", 0, 0, error.strerror or str(error))]
    except EOFError as error:
        return [Photo(file, file, 0, 0, "", 0, 0, str(error))]


def scan(folder: Path, files: Sequence[str], index: Index, cache: Path | None = None) -> PhotoTable:
    """The photos in some files of a folder, in that order.

    Of a file only what `photo_of` says is read. What is found is kept in `cache`, a folder, and used again
    for a file of the same size, inode and times of change.
    """
    place, kept = None, _NOTHING
    if cache is not None:
        key = f"{folder.resolve()}\n{index.__name__}"
        place = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
        kept = _load(place)
    stamps = _stamps(folder, files)
    rows = kept.rows(files, stamps)
    new = [number for number, row in enumerate(rows.tolist()) if row < 0]
    if not new:
        return kept.photos_of(rows)
    tables: list[PhotoTable] = []
    counts: list[int] = []
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(new), _AT_ONCE):
            part = new[first : first + _AT_ONCE]
            found = list(pool.map(lambda number: index(folder, files[number]), part))
            for number, photos in zip(part, found, strict=True):
                counts.append(len(photos))
                if any(not photo.digest for photo in photos):
                    stamps[number] = 0  # what could not be read just now may be readable the next time
            tables.append(PhotoTable.of([photo for photos in found for photo in photos]))
    fresh = _Kept(
        Strings.of(files[number] for number in new),
        stamps[new],
        np.array(counts, np.int64),
        PhotoTable.join(tables),
    )
    whole = kept.merged(fresh)
    if place is not None:
        _save(place, whole)
    return whole.photos_of(whole.rows(files, stamps, trusted=True))


def digest_of(photos: Iterable[Photo]) -> str:
    """Of the names, sizes, heads and tails of some photos, in any order."""
    lines = sorted(f"{photo.name}\0{photo.length}\0{photo.digest}" for photo in photos)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def combined(digests: Sequence[tuple[str, str]]) -> str:
    """Of the names and digests of some sources, in any order."""
    return hashlib.sha256(
        "\n".join(sorted(f"{name}\0{digest}" for name, digest in digests)).encode()
    ).hexdigest()


def kept_table(cache: Path | None, key: str, make: Callable[[], PhotoTable]) -> PhotoTable:
    """What `make` gives, kept in `cache` under a key; an empty key keeps nothing."""
    if cache is None or not key:
        return make()
    place = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    kept = _load(place)
    if not len(kept.files):
        photos = make()
        counts = np.array([len(photos)], np.int64)
        kept = _Kept(Strings.of([key]), np.ones((1, 4), np.int64), counts, photos)
        _save(place, kept)
    return kept.photos


def write_manifest(place: Path, digest: str, sources: Sequence[tuple[str, Sequence[Photo]]]) -> None:
    """Write a JSON file: the digest, and by source each photo's name, bytes, width, height and digest.

    Its folder is made if it is not there.
    """
    content = {
        "digest": digest,
        "sources": [
            {
                "name": name,
                "photos": [
                    [photo.name, photo.length, photo.width, photo.height, photo.digest] for photo in photos
                ],
            }
            for name, photos in sources
        ],
    }
    write_whole(place, (json.dumps(content, indent=1) + "\n").encode())


def head_size(head: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG or PNG file from its first bytes; None leaves the question open."""
    size = None
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR" and len(head) >= 24:
        size = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    elif head[:2] == b"\xff\xd8":
        at = 2
        while at + 9 <= len(head) and head[at] == 0xFF and 0xC0 <= head[at + 1] <= 0xFE:
            if head[at + 1] in _FRAMES:
                size = (
                    int.from_bytes(head[at + 7 : at + 9], "big"),
                    int.from_bytes(head[at + 5 : at + 7], "big"),
                )
                break
            at += 2 + int.from_bytes(head[at + 2 : at + 4], "big")
    return size if size and 0 < size[0] * size[1] <= MAX_PIXELS else None


def _part(stream: BinaryIO, begin: int, length: int) -> bytes:
    if not length:
        return b""
    stream.seek(begin)
    data = stream.read(length)
    if len(data) < length:
        raise EOFError("unexpected end of data")
    return data


def _sized(photo: Photo, data: bytes) -> Photo:
    try:
        width, height = picture_size(data, photo.name)
    except ImageFileError as error:
        return photo._replace(fault=error.reason)
    return photo._replace(width=width, height=height, fault="")


class _Kept(NamedTuple):
    """What is known of some files.

    Args:
        files: Their names.
        stamps: int64 `(F, 4)`: size, times of change, inode; 0 if a file must be looked into again.
        counts: int64 `(F,)`: how many photos each holds.
        photos: Theirs, in their order.
    """

    files: Strings
    stamps: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    photos: PhotoTable

    def rows(
        self, files: Sequence[str], stamps: npt.NDArray[np.int64], *, trusted: bool = False
    ) -> npt.NDArray[np.int64]:
        """Which of the known files each of some files is, -1 for none that has that stamp."""
        if len(files) == len(self.files) and np.array_equal(stamps, self.stamps):
            same = all(known == file for known, file in zip(self.files, files, strict=True))
            if same and (trusted or self.stamps.any(axis=1).all()):
                return np.arange(len(files), dtype=np.int64)
        places = {file: row for row, file in enumerate(self.files)}
        rows = np.fromiter((places.get(file, -1) for file in files), np.int64, len(files))
        if not trusted and len(rows):
            known = self.stamps[rows] if len(self.files) else np.zeros_like(stamps)
            rows[~((known == stamps).all(axis=1) & stamps.any(axis=1))] = -1
        return rows

    def photos_of(self, rows: npt.NDArray[np.int64]) -> PhotoTable:
        """The photos of some of the files."""
        ends = np.cumsum(self.counts)
        begins = ends - self.counts
        if len(rows) == len(self.files) and np.array_equal(rows, np.arange(len(rows))):
            return self.photos
        parts = [np.arange(begins[row], ends[row], dtype=np.int64) for row in rows]
        return self.photos.take(np.concatenate([np.empty(0, np.int64), *parts]))

    def merged(self, fresh: _Kept) -> _Kept:
        """These, with what is newly known in place of what was known of the same files."""
        if not len(self.files):
            return fresh
        renewed = frozenset(fresh.files)
        stay = np.array([row for row, file in enumerate(self.files) if file not in renewed], np.int64)
        return _Kept(
            Strings.of([*(self.files[int(row)] for row in stay), *fresh.files]),
            np.concatenate([self.stamps[stay], fresh.stamps]),
            np.concatenate([self.counts[stay], fresh.counts]),
            PhotoTable.join([self.photos_of(stay), fresh.photos]),
        )


_NOTHING: Final = _Kept(
    Strings.of([]), np.empty((0, 4), np.int64), np.empty(0, np.int64), PhotoTable.of(list[Photo]())
)


def _stamps(folder: Path, files: Sequence[str]) -> npt.NDArray[np.int64]:
    stamps = np.zeros((len(files), 4), np.int64)
    for number, file in enumerate(files):
        with contextlib.suppress(OSError):
            status = os.stat(os.path.join(folder, file))
            stamps[number] = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino % 2**63
    return stamps


def _load(place: Path) -> _Kept:
    try:
        with np.load(place) as content:
            if int(content["format"]) != _FORMAT:
                return _NOTHING
            names = Strings(content["names"], content["name_ends"])
            files = names if "files" not in content else Strings(content["files"], content["file_ends"])
            faults = {int(row): fault for row, fault in json.loads(content["faults"].tobytes()).items()}
            photos = PhotoTable(names, files, content["numbers"], content["digests"], faults)
            known = Strings(content["known"], content["known_ends"])
            return _Kept(known, content["stamps"], content["counts"], photos)
    # None yet, or of no use: the files are looked into again.
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return _NOTHING


def _save(place: Path, kept: _Kept) -> None:
    photos = kept.photos
    columns = {
        "format": np.int64(_FORMAT),
        "names": photos.names.blob,
        "name_ends": photos.names.ends,
        "numbers": photos.numbers,
        "digests": photos.digests,
        "faults": np.frombuffer(json.dumps(photos.faults).encode(), np.uint8),
        "known": kept.files.blob,
        "known_ends": kept.files.ends,
        "stamps": kept.stamps,
        "counts": kept.counts,
    }
    if photos.files is not photos.names:
        columns |= {"files": photos.files.blob, "file_ends": photos.files.ends}
    # A full or read-only disk is no fault: the next run looks into the files again.
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as beside:
            whole = Path(beside) / place.name
            np.savez(whole, **columns)
            whole.replace(place)
