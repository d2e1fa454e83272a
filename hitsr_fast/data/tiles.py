"""Large photos cut into overlapping sub-images once, which are then read whole and quickly."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final, NamedTuple

from PIL import Image

from hitsr_fast.checks import check_integer
from hitsr_fast.data.crops import NoPhotosError, decoded_rgb
from hitsr_fast.data.folder import photo_names
from hitsr_fast.data.manifest import digest_of, index_image, scan
from hitsr_fast.data.photo_table import Photo
from hitsr_fast.data.readers import FileReader
from hitsr_fast.files import write_whole
from hitsr_fast.imaging.io import ImageFileError

MANIFEST: Final = "manifest.json"
_JOURNAL: Final = ".manifest.partial.jsonl"  # what is done of a run that did not end
_COMPRESSION: Final = 3


class Cut(NamedTuple):
    """What became of a photo.

    Args:
        name: Of the photo in its folder.
        crops: Names of its sub-images.
        fault: Why there are none.
        made: Whether they were made now.
    """

    name: str
    crops: list[str]
    fault: str
    made: bool


def starts(length: int, size: int, step: int) -> list[int]:
    """Where sub-images begin along a side: every `step`, the last one flush with the end.

    Example:
        >>> starts(1200, 512, 256), starts(512, 512, 256), starts(300, 512, 256)
        ([0, 256, 512, 688], [0], [0])
    """
    last = max(0, length - size)
    return [*range(0, last, step), last]


def cut_photos(
    source: str | Path, target: str | Path, *, size: int = 512, step: int = 256, workers: int = 2
) -> Iterator[Cut]:
    """Cut the photos of a folder into PNG files of another, and describe them in its `manifest.json`.

    The sub-images of `a/b.jpg` are `a/b_s001.png`, `a/b_s002.png` and so on, row by row. A photo that is
    smaller than `size` along a side is whole along it. Pixels are those that training reads: upright, 8 bits,
    RGB.

    Args:
        source: Folder of the photos.
        target: Folder of the sub-images, apart from the photos'; made if it is not there. A photo whose
            sub-images are all there, made with these arguments from what it is now, is not cut again; those
            of a photo that is gone are removed.
        size: Side of a sub-image in pixels.
        step: From one to the next.
        workers: Threads; each holds one photo.

    Yields:
        What became of each photo, as it is done.

    Raises:
        TypeError, ValueError: An argument is of another type or out of range, one folder is in the other, or
            two photos would have the same sub-images.
        NoPhotosError: There are no photos.
        OSError: The target cannot be written.
    """
    check_integer("size", size, 8)
    check_integer("step", step, 1, size, "size")
    check_integer("workers", workers, 1)
    source, target = Path(source), Path(target)
    _check_apart(source, target)
    names = photo_names(source)
    if not names:
        raise NoPhotosError(f"source: expected a folder with image files, found none in {str(source)!r}")
    stems: dict[str, str] = {}
    for name in names:
        other = stems.setdefault(os.path.splitext(name)[0], name)
        if other != name:
            raise ValueError(
                f"source: expected names of their own before the suffix, found {other} and {name}"
            )
    photos = scan(source, names, index_image)
    known = {"size": size, "step": step}
    try:
        target.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"target: expected a folder, or none yet, found a file at or above {str(target)!r}"
        ) from error
    before = _read_entries(target)
    done = {
        name: entry
        for name, entry in before.items()
        if all(entry.get(key) == value for key, value in known.items())
    }
    entries: dict[str, dict[str, Any]] = {}
    with (target / _JOURNAL).open("a", encoding="utf-8", errors="surrogateescape") as journal:

        def take(cut: Cut, photo: Photo) -> Cut:
            for old in set(before.get(cut.name, {}).get("crops", [])).difference(cut.crops):
                (target / old).unlink(missing_ok=True)  # of another size, or of what the photo was
            entries[cut.name] = {"file": cut.name, **known, "digest": photo.digest, "length": photo.length}
            entries[cut.name] |= {"fault": cut.fault} if cut.fault else {"crops": cut.crops}
            journal.write(json.dumps(entries[cut.name]) + "\n")
            journal.flush()
            return cut

        for photo, future in _ahead(photos, source, target, size, step, workers, done):
            yield take(future.result() if isinstance(future, Future) else future, photo)
    current = {crop for entry in entries.values() for crop in entry.get("crops", [])}
    for name in before.keys() - entries.keys():  # photos that are gone
        for old in set(before[name].get("crops", [])) - current:
            (target / old).unlink(missing_ok=True)
    _write_manifest(target, known, digest_of(photos), [entries[name] for name in sorted(entries)])


def _check_apart(source: Path, target: Path) -> None:
    """Sub-images among the photos would be cut as well the next time, and counted as each other."""
    first, second = source.resolve(), target.resolve()
    if first.is_relative_to(second) or second.is_relative_to(first):
        raise ValueError(
            f"target: expected a folder apart from the photos', found {str(target)!r} for those in "
            f"{str(source)!r}"
        )


def _ahead(
    photos: Sequence[Photo],
    source: Path,
    target: Path,
    size: int,
    step: int,
    workers: int,
    done: dict[str, dict[str, Any]],
) -> Iterator[tuple[Photo, Cut | Future[Cut]]]:
    """What is done, as it is; never more than two photos a thread are under way."""
    running: dict[Future[Cut], Photo] = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            for photo in photos:
                crops = _whole(target, photo, done.get(photo.name))
                if crops is not None:
                    yield photo, Cut(photo.name, crops, "", made=False)
                    continue
                running[pool.submit(_cut, source, target, photo, size, step)] = photo
                if len(running) >= 2 * workers:
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        yield running.pop(future), future
            while running:
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield running.pop(future), future
        finally:
            for future in running:
                future.cancel()


def _cut(source: Path, target: Path, photo: Photo, size: int, step: int) -> Cut:
    """The sub-images of one photo, written."""
    reader = FileReader(source)
    try:
        if photo.fault:
            raise ImageFileError(reader.place(photo), photo.fault)
        pixels = decoded_rgb(reader.read(photo), reader.place(photo))
    except ImageFileError as error:
        return Cut(photo.name, [], error.reason, made=False)
    stem = os.path.splitext(photo.name)[0]
    crops: list[str] = []
    for top in starts(pixels.shape[0], size, step):
        for left in starts(pixels.shape[1], size, step):
            crops.append(f"{stem}_s{len(crops) + 1:03}.png")
            buffer = io.BytesIO()
            tile = pixels[top : top + size, left : left + size]
            Image.fromarray(tile.copy()).save(buffer, "PNG", compress_level=_COMPRESSION)
            write_whole(target / crops[-1], buffer.getvalue())
    return Cut(photo.name, crops, "", made=True)


def _whole(target: Path, photo: Photo, entry: dict[str, Any] | None) -> list[str] | None:
    """The sub-images of a photo that is done, if all are there."""
    if entry is None or not entry.get("crops") or not photo.digest:
        return None
    if (entry.get("digest"), entry.get("length")) != (photo.digest, photo.length):
        return None
    crops: list[str] = entry["crops"]
    return crops if all((target / crop).is_file() for crop in crops) else None


def _read_entries(target: Path) -> dict[str, dict[str, Any]]:
    """What earlier runs did, by photo."""
    entries: dict[str, dict[str, Any]] = {}
    place = target / MANIFEST
    if place.exists():
        try:
            content = json.loads(place.read_text(encoding="utf-8"))
            entries = {entry["file"]: entry for entry in content["photos"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{place}: expected a manifest of this command; move it away") from error
    with contextlib.suppress(FileNotFoundError):
        for line in (target / _JOURNAL).read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            with contextlib.suppress(ValueError):  # the last line of a run that was killed
                entry = json.loads(line)
                entries[entry["file"]] = entry
    return entries


def _write_manifest(
    target: Path, known: dict[str, int], source_digest: str, entries: list[dict[str, Any]]
) -> None:
    names = photo_names(target)
    content = {
        **known,
        "source_digest": source_digest,
        "digest": digest_of(scan(target, names, index_image)),
        "photos": entries,
    }
    write_whole(target / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())
    (target / _JOURNAL).unlink()
