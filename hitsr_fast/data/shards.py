"""Photos in WebDataset shards: tar files of images, read at random by an index that is made once.

The standard library does it, without the package `webdataset`: that streams shards, so that a sample is a
function of what was read before it, which neither resumes at any step nor is the same on any number of
processes. With the places of all members known, a photo of a shard is read like a file.
"""

from __future__ import annotations

import itertools
import re
import tarfile
from pathlib import Path

from hitsr_fast.data.folder import is_photo, photo_names
from hitsr_fast.data.manifest import Photo, photo_of


def shard_files(path: str | Path) -> list[Path] | None:
    """The shards of a set, or None if it is not one of shards.

    Args:
        path: A .tar file, a pattern of them such as `photos-{000..009}.tar`, or a folder of them.

    Raises:
        ValueError: a shard of the pattern is not there, or the folder also has images beside its shards.
    """
    path = Path(path)
    if path.is_dir():
        shards = sorted(file for file in path.iterdir() if file.suffix == ".tar")
        loose = photo_names(path) if shards else []
        if loose:
            raise ValueError(
                f"data: expected images or .tar files, found both in {str(path)!r}: {loose[0]} beside "
                f"{shards[0].name}; a pattern takes the shards alone"
            )
        return shards or None
    if path.suffix != ".tar":
        return None
    files = [Path(name) for name in _expanded(str(path))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"data: expected an existing shard, found no file {str(file)!r}")
    return files


def index_shard(folder: Path, file: str) -> list[Photo]:
    """The photos in a shard; one that cannot be read is an entry with a fault.

    Of a shard that is cut off, the photos that are whole are there, beside the entry of the shard itself.
    """
    photos: list[Photo] = []
    try:
        with (folder / file).open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as shard:
            for member in shard:
                if not member.isfile() or not is_photo(member.name):
                    continue
                name = f"{file}/{member.name}"
                photos.append(photo_of(name, file, member.offset_data, member.size, stream))
    except OSError as error:
        photos.append(_unreadable(file, error.strerror or str(error)))
    except (tarfile.TarError, EOFError) as error:
        photos.append(_unreadable(file, f"not a whole uncompressed tar file: {error}"))
    return photos


def _unreadable(file: str, reason: str) -> Photo:
    return Photo(file, file, 0, 0, "", 0, 0, " ".join(reason.split()))


def _expanded(pattern: str) -> list[str]:
    """`a-{08..10}.tar` is a-08.tar, a-09.tar and a-10.tar; of several ranges, all combinations."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    texts, lows, highs = parts[::3], parts[1::3], parts[2::3]
    ranges = [
        [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
        for low, high in zip(lows, highs, strict=True)
    ]
    return [
        "".join(itertools.chain.from_iterable(zip(texts, (*numbers, ""), strict=True)))
        for numbers in itertools.product(*ranges)
    ]
