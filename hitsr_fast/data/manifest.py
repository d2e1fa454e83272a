"""What a set of photos holds: each photo's place, size and digest, found once and kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from hitsr_fast.imaging.io import ImageFileError, picture_size

_FORMAT: Final = 1


class Photo(NamedTuple):
    """A photo of a set.

    Args:
        name: In the set; its stem is that of the photo.
        file: That holds it, relative to the set's folder.
        offset: Of its first byte in the file.
        length: Of its bytes.
        digest: Of its bytes (BLAKE2b of 128 bits, in hex).
        width, height: As its head says; 0 if that cannot be read.
        fault: Why it cannot be read; empty if it can, as far as its head shows.
    """

    name: str
    file: str
    offset: int
    length: int
    digest: str
    width: int
    height: int
    fault: str


Index = Callable[[Path, str], list[Photo]]
"""The photos in a file of a folder."""


def photo_of(name: str, file: str, offset: int, data: bytes) -> Photo:
    """The entry of a photo with these bytes."""
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    try:
        (width, height), fault = picture_size(data, name), ""
    except ImageFileError as error:
        width, height, fault = 0, 0, error.reason
    return Photo(name, file, offset, len(data), digest, width, height, fault)


def index_image(folder: Path, file: str) -> list[Photo]:
    """An image file is one photo, even if it is broken or gone."""
    try:
        return [photo_of(file, file, 0, (folder / file).read_bytes())]
    except OSError as error:
        return [Photo(file, file, 0, 0, "", 0, 0, error.strerror or str(error))]


def scan(folder: Path, files: Sequence[str], index: Index, cache: Path | None = None) -> list[Photo]:
    """The photos in some files of a folder, in that order.

    All bytes are read once, so that a photo that changes also changes the digest; what is found is kept in
    `cache`, a folder, and used again for a file of the same size, inode and times of change.
    """
    kept: dict[str, tuple[list[int], list[Photo]]] = {}
    place = None
    if cache is not None:
        key = f"{folder.resolve()}\n{index.__name__}"
        place = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        kept = _load(place)
    found: dict[str, tuple[list[int], list[Photo]]] = {}
    for file in files:
        stamp = _stamp(folder / file)
        if file in kept and stamp and kept[file][0] == stamp:
            found[file] = kept[file]
        else:
            photos = index(folder, file)
            # What could not be read just now may be readable the next time.
            found[file] = (stamp if all(photo.digest for photo in photos) else [], photos)
    if place is not None and any(kept.get(file) != entry for file, entry in found.items()):
        _save(place, {**kept, **found})
    return [photo for _, photos in found.values() for photo in photos]


def digest_of(photos: Iterable[Photo]) -> str:
    """Of the names, sizes and contents of some photos, in any order."""
    lines = sorted(f"{photo.name}\0{photo.length}\0{photo.digest}" for photo in photos)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _load(place: Path) -> dict[str, tuple[list[int], list[Photo]]]:
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            return {}
        return {
            file: (stamp, [Photo(*photo) for photo in photos])
            for file, (stamp, photos) in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or of no use: the files are read again
        return {}


def _save(place: Path, found: dict[str, tuple[list[int], list[Photo]]]) -> None:
    # A full or read-only disk is no fault: the next run reads the files again.
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as beside:
            whole = Path(beside) / place.name
            whole.write_text(json.dumps({"format": _FORMAT, "files": found}), encoding="utf-8")
            whole.replace(place)
