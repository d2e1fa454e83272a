"""Photos of a folder: their names, which of them are held out, and a stream of sharp random crops."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hitsr_fast.checks import check_integer
from hitsr_fast.data.crops import DECODED_BYTES, Decoded, NoPhotosError, PhotoCrops, round_trip_psnr
from hitsr_fast.data.manifest import index_image, scan
from hitsr_fast.data.readers import FileReader
from hitsr_fast.data.source_config import PLAIN

__all__ = ["DEFAULT_HOLDOUT", "NoPhotosError", "PhotoFolder", "photo_names", "round_trip_psnr", "split"]

SHOWN: Final = (
    "budgie-backgrounds__casa-mila",
    "budgie-backgrounds__oakland-zoo-otters",
    "budgie-backgrounds__perched-osprey",
    "budgie-backgrounds__tea-gardens",
)
"""Stems of the photos that this package shows, and of their neighbours."""

DEFAULT_HOLDOUT: Final = (
    *SHOWN,
    "budgie-core__default",
    "enlightenment-data__red-maple",
    "enlightenment-data__snow-trees",
    "lomiri-wallpapers-16.04__bridge_by_sander_klootwijk",
    "lomiri-wallpapers-16.04__life_by_aitzol_berasategi",
    "lomiri-wallpapers-16.04__picosdeeuropa_by_aitzol_berasategi",
    "lomiri-wallpapers-16.04__seeding_by_clements_engelhardt",
    "lomiri-wallpapers-20.04__kleiber_by_lukas_baubkus",
    "lxqt-themes__flowers",
    "mate-backgrounds__dune",
    "palapeli-data__citrus-fruits",
    "plasma-workspace-wallpapers__eveningglow",
)
"""Stems of photos that are never trained on: those above, and of those of `hitsr-fast photos` twelve across
packages and sharpness."""

_EVERY: Final = 16  # of other photos one is held out

_SUFFIXES: Final = frozenset((".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"))


def is_photo(name: str) -> bool:
    """Whether a file is taken for an image: by its suffix, and not hidden."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in _SUFFIXES and not any(part[:1] == "." != part for part in name.split("/"))


def photo_names(folder: str | Path) -> list[str]:
    """The image files of a folder and its subfolders, by their suffix; hidden ones are left out.

    Returns:
        Paths relative to the folder, with forward slashes, sorted.

    Raises:
        ValueError: if `folder` is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder: expected an existing folder, found {str(folder)!r}")
    found: list[str] = []
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(here).relative_to(folder).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        found += [prefix + name for name in files if is_photo(name)]
    return sorted(found)


def split(names: Sequence[str], holdout: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Split photos into those to train on and those held out; by photo, as patches of one are too alike.

    Args:
        names: file names, as from `photo_names`.
        holdout: stems of the photos to hold out; by default those of `DEFAULT_HOLDOUT` that are there, and
            where none is, every sixteenth by name, beginning with the first.

    Returns:
        train, held_out: both in the order of `names`.

    Raises:
        NoPhotosError: if nothing would be held out, or nothing left to train on.
    """
    stems = frozenset(DEFAULT_HOLDOUT if holdout is None else holdout)
    held_out = {name for name in names if Path(name).stem in stems}
    if not held_out and holdout is None:
        held_out = set(sorted(names)[::_EVERY])
    if len(names) < 2:
        raise NoPhotosError(
            f"photos: expected at least two, one of which is held out of training, found {len(names)}"
        )
    example = f"for example --data.holdout {Path(names[0]).stem}"
    if not held_out:
        raise NoPhotosError(
            f"data.holdout: expected names without suffix of some of the {len(names)} photos, {example}, "
            f"found none of {', '.join(sorted(stems))}"
        )
    if len(held_out) == len(names):
        raise NoPhotosError(
            f"data.holdout: expected photos left to train on, {example}, found all {len(names)} held out"
        )
    return [name for name in names if name not in held_out], [name for name in names if name in held_out]


class PhotoFolder(Dataset[Tensor]):
    """Endless deterministic sharp random crops of the photos of a folder (see `PhotoCrops` and `PLAIN`).

    Crop `i` depends on (`seed`, `i`) and the folder only.

    Args:
        folder: where the photos are.
        crop: side of a crop in pixels.
        names: which photos, relative to the folder; all by default.
        seed: not negative.
        length: crops in one epoch; the whole area once by default.
        sharpness_db, flat_fraction, tries: as for `CropConfig`; an infinite `sharpness_db` keeps every crop.
        memory: most bytes of decoded photos that are held.
        cache: as for `PhotoCrops`.

    Raises:
        TypeError, ValueError: if an argument is of another type or out of range.
        NoPhotosError: if no photo is usable.

    Notes:
        A file that cannot be read, or is smaller than a crop, is left out and has its reason in `skipped`.
    """

    def __init__(
        self,
        folder: str | Path,
        crop: int = 128,
        *,
        names: Sequence[str] | None = None,
        seed: int = 0,
        length: int | None = None,
        sharpness_db: float = 32.0,
        flat_fraction: float = 0.1,
        tries: int = 8,
        memory: int = DECODED_BYTES,
        cache: str | Path | None = None,
    ) -> None:
        check_integer("seed", seed, 0)
        if length is not None:
            check_integer("length", length, 1)
        names = photo_names(folder) if names is None else names
        self._crops = PhotoCrops(
            FileReader(folder),
            scan(Path(folder), names, index_image),
            crop,
            replace(
                PLAIN,
                sharpness_db=None if sharpness_db == math.inf else sharpness_db,
                flat_fraction=flat_fraction,
                tries=tries,
            ),
            decoded=Decoded(memory),
            cache=cache,
        )
        self.crop, self.seed = crop, seed
        self._length = length or max(1, self._crops.area // crop**2)

    @property
    def names(self) -> list[str]:
        """Of the photos that crops are drawn from."""
        return [photo.name for photo in self._crops.photos]

    @property
    def skipped(self) -> dict[str, str]:
        """Reason by file, of the photos that are left out, as far as it is known."""
        return self._crops.skipped

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        """Crop `index` of the epoch: uint8 `(3, crop, crop)`."""
        if not 0 <= index < self._length:
            raise IndexError(f"index: expected 0 to {self._length - 1}, found {index}")
        return self._draw(index)

    def batch(self, first_index: int, size: int) -> Tensor:
        """Successive crops of the endless stream, float32 `(size, 3, crop, crop)` in [0, 1].

        `first_index` may lie beyond the epoch.
        """
        crops = torch.stack([self._draw(index) for index in range(first_index, first_index + size)])
        return crops.float().div_(255)

    def _draw(self, index: int) -> Tensor:
        return torch.from_numpy(self._crops.draw(np.random.default_rng((self.seed, index)), self.crop))
