"""Sources of a data set: where their photos lie, which are held out, and crops of all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hitsr_fast import env
from hitsr_fast.data.crops import DECODED_BYTES, Decoded, NoPhotosError, PhotoCrops, generator
from hitsr_fast.data.folder import photo_names, split
from hitsr_fast.data.manifest import combined, index_image, scan
from hitsr_fast.data.photo_table import PhotoTable
from hitsr_fast.data.readers import FileReader, Reader
from hitsr_fast.data.rows import PREFIX, RowReader
from hitsr_fast.data.scores import Scores
from hitsr_fast.data.shards import index_shard, shard_files
from hitsr_fast.data.source_config import PLAIN, CropConfig, SourceConfig, check_sources

_CHOICE = 1  # tells the draw of a source from those of its crop


class Found(NamedTuple):
    """The photos of a source.

    Args:
        reader: Of their bytes.
        photos: All that the source's limit and scores leave, usable or not.
        out: How many the scores left out.
    """

    reader: Reader
    photos: PhotoTable
    out: int


class Sources:
    """Crops of several sources: which one a sample is of is a function of its key as well.

    Args:
        drawn: Each source's configuration and crops, all of the same side.

    Attributes:
        configs: Of the sources, by number.
        digest: Of the sources' names and digests.
        side: Of the crops.
        skipped: Reason by file, of the photos that cannot be read, as far as it is known.
    """

    def __init__(self, drawn: Sequence[tuple[SourceConfig, PhotoCrops]]) -> None:
        self.configs = tuple(config for config, _ in drawn)
        self.crops = tuple(crops for _, crops in drawn)
        self.side = self.crops[0].side
        self.digest = combined([(config.name, crops.digest) for config, crops in drawn])
        self.skipped: dict[str, str] = {}
        self._named: set[str] = set()
        for crops in self.crops:
            self.skipped |= crops.skipped
            crops.skipped = self.skipped  # so that what other processes found is known to all
        weights = [config.weight for config in self.configs]
        if None in weights:
            weights = [float(len(crops.photos)) for crops in self.crops]
        shares = np.cumsum(np.array(weights, np.float64))
        self._shares: npt.NDArray[np.float64] = shares / shares[-1]

    def source_of(self, seed: int, phase: str, index: int) -> int:
        """Number of the source of a key's crop. No photo that breaks changes it."""
        value = generator(seed, phase, index, _CHOICE).random()
        return int(np.searchsorted(self._shares, value, side="right"))

    def label_of(self, seed: int, phase: str, index: int) -> int:
        """1 if a key's crop is of a negative source, else 0."""
        return int(self.configs[self.source_of(seed, phase, index)].role == "negative")

    def crop(self, seed: int, phase: str, index: int, size: int) -> Tensor:
        """The crop of a key: uint8 `(3, size, size)`, `size` at most `side`; see `PhotoCrops.crop`."""
        return self.crops[self.source_of(seed, phase, index)].crop(seed, phase, index, size)

    def newly_skipped(self) -> dict[str, str]:
        """Of `skipped` what no call has given before, so that each is named once."""
        fresh = {place: reason for place, reason in self.skipped.items() if place not in self._named}
        self._named |= fresh.keys()
        return fresh

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """`PhotoCrops.counts` by source."""
        return {config.name: crops.counts for config, crops in zip(self.configs, self.crops, strict=True)}


def describe(counts: dict[str, dict[str, int]]) -> list[str]:
    """A line a source: how many images, and how many of them are small or of no use."""
    lines = []
    for name, numbers in counts.items():
        words = [f"{count} {what}" for what, count in numbers.items() if count and what != "images"]
        lines.append(", ".join([f"{name}: {numbers['images']} images", *words]))
    return lines


def find(config: SourceConfig, root: Path) -> Found:
    """The photos of a source below a root.

    Raises:
        ValueError: There is nothing at its path, or its scores do not fit.
        NoPhotosError: It has no images.
    """
    cache = env.cache_dir() / "manifests"
    reader: RowReader | FileReader
    if config.path.startswith(PREFIX):
        reader = RowReader(config.path, root)
        photos = reader.photos(0 if config.scores else config.limit, cache)
    else:
        path = root / config.path
        shards = shard_files(path)
        if shards is not None:
            reader = FileReader(path if path.is_dir() else path.parent)
            photos = scan(reader.folder, [shard.name for shard in shards], index_shard, cache)
        elif path.is_dir():
            names, out = _named(config, root, path)
            return Found(FileReader(path), scan(path, names, index_image, cache), out)
        else:
            raise ValueError(f"data: expected a folder or .tar files, found nothing at {str(path)!r}")
    left = np.arange(len(photos), dtype=np.int64)
    if config.scores:
        negative = config.role == "negative"
        left = np.array(Scores(config, root).rows(photos.names, negative), np.int64)
    return Found(reader, photos.take(left[: config.limit or None]), len(photos) - len(left))


def count(config: SourceConfig, root: Path) -> int:
    """How many images a source has, by the names of its files where they say it; raises as `find` does."""
    folder = root / config.path
    if not config.path.startswith(PREFIX) and shard_files(folder) is None and folder.is_dir():
        return len(_named(config, root, folder)[0])
    return len(find(config, root).photos)


def _named(config: SourceConfig, root: Path, folder: Path) -> tuple[list[str], int]:
    """Images of a folder that a source's limit and scores leave, and how many the scores left out."""
    names = photo_names(folder)
    if not names:
        raise NoPhotosError(f"data: expected a folder with image files, found none in {str(folder)!r}")
    chosen = names
    if config.scores:
        chosen = [names[row] for row in Scores(config, root).rows(names, config.role == "negative")]
    return chosen[: config.limit or None], len(names) - len(chosen)


def open_sources(
    root: str | Path,
    sources: Sequence[SourceConfig] = (),
    *,
    holdout: Sequence[str] | None,
    crop: int,
    memory: int = DECODED_BYTES,
) -> tuple[PhotoCrops | Sources, PhotoCrops | Sources]:
    """The crops to train on, and those that are held out.

    Args:
        root: Where the sources' folders are. Without sources it is the only one itself, by the rules of
            `PLAIN`: a folder of images, of .tar files, a pattern of those, or `hf:NAME[:SPLIT[:COLUMN]]`.
        sources: See `SourceConfig`.
        holdout: Stems of the photos that are held out of the sources of role "train". By default, where a
            source is of role "held-out", none beside its own; else as `split` has it over all names, which
            begin with the source's.
        crop: Side of the crops in pixels.
        memory: Most bytes of decoded photos that a process holds of the two together.

    Raises:
        ValueError: There is nothing at a path, or the sources do not fit together.
        NoPhotosError: No photo of a source is usable, or one of the two parts is empty.
        ModuleNotFoundError: A source needs a package that is not installed.
    """
    check_sources(sources)
    root = Path(root)
    if not sources:
        return _plain(root, holdout, crop, memory)
    found = [find(config, root) for config in sources]
    separate = any(config.role == "held-out" for config in sources)
    held: frozenset[str] = frozenset()
    if holdout is not None or not separate:
        names = [
            f"{config.name}/{name}"
            for config, (_, photos, _) in zip(sources, found, strict=True)
            if config.role == "train"
            for name in photos.take(_usable(photos, config, crop)).names
        ]
        held = frozenset(split(names, holdout)[1])
    parts: tuple[list[tuple[SourceConfig, PhotoCrops]], ...] = ([], [])
    decoded = Decoded(memory)
    for config, (reader, photos, out) in zip(sources, found, strict=True):
        is_held = np.full(len(photos), config.role == "held-out")
        if held and config.role == "train":
            is_held = np.array([f"{config.name}/{name}" in held for name in photos.names], np.bool_)
        for part, rows in enumerate((~is_held, is_held)):
            if rows.any() or not (part or config.role == "held-out"):
                taken = photos.take(np.flatnonzero(rows))
                crops = _crops(config, reader, taken, crop, decoded)
                if out:
                    crops.counts["left out by score"] = out
                parts[part].append((config, crops))
    return Sources(parts[0]), Sources(parts[1])


def open_source(
    path: str | Path,
    *,
    holdout: tuple[str, ...] | None,
    crop: int,
    held_out: bool,
    sources: Sequence[SourceConfig] = (),
    memory: int = DECODED_BYTES,
) -> PhotoCrops | Sources:
    """One of the two that `open_sources` gives: what is held out, or what is trained on."""
    return open_sources(path, sources, holdout=holdout, crop=crop, memory=memory)[held_out]


def _plain(
    path: Path, holdout: Sequence[str] | None, crop: int, memory: int
) -> tuple[PhotoCrops | Sources, PhotoCrops | Sources]:
    reader, photos, _ = find(SourceConfig(path=str(path)), Path())
    usable = photos.take(_usable(photos, PLAIN, crop))
    if not len(usable):
        PhotoCrops(reader, photos, crop)  # which says why
    held = frozenset(split(list(usable.names), holdout)[1])
    rows = np.array([name in held for name in photos.names], np.bool_)
    decoded = Decoded(memory)
    train, held_out = (
        PhotoCrops(reader, photos.take(np.flatnonzero(part)), crop, decoded=decoded) for part in (~rows, rows)
    )
    return train, held_out


def _usable(photos: PhotoTable, config: CropConfig, crop: int) -> npt.NDArray[np.int64]:
    usable = photos.sound
    if config.small == "leave out":
        usable = usable & (photos.shorter_sides >= crop)
    return np.flatnonzero(usable)


def _crops(
    config: SourceConfig, reader: Reader, photos: PhotoTable, crop: int, decoded: Decoded
) -> PhotoCrops:
    try:
        return PhotoCrops(reader, photos, crop, config, decoded=decoded, name=config.name)
    except NoPhotosError as error:
        raise NoPhotosError(f"{config.name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{config.name}.{error}") from error
