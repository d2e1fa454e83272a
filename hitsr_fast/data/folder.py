"""Photos of a folder as a stream of sharp random crops.

Most of a photo is sky, skin or out of focus, and a model that trains on it learns to blur: a crop is kept
only if shrinking it by four loses detail.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hitsr_fast.checks import check_integer, check_number
from hitsr_fast.imaging.io import ImageFileError, read_picture, to_eight_bit

DEFAULT_HOLDOUT: Final = (
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
"""Stems of the photos of `hitsr-fast photos` that are never trained on, across packages and sharpness."""

_SUFFIXES: Final = frozenset((".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"))

_Pixels = npt.NDArray[np.uint8]


class NoPhotosError(ValueError):
    """No photo of a folder can be trained on."""


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
    relative = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    return sorted(path.as_posix() for path in relative if not any(part[0] == "." for part in path.parts))


def split(names: Sequence[str], holdout: Sequence[str] = DEFAULT_HOLDOUT) -> tuple[list[str], list[str]]:
    """Split photos into those to train on and those held out; by photo, as patches of one are too alike.

    Args:
        names: file names, as from `photo_names`.
        holdout: stems of the photos to hold out.

    Returns:
        train, held_out: both in the order of `names`.

    Raises:
        ValueError: if no name matches `holdout`, so that nothing would be held out.
    """
    held_out = [name for name in names if Path(name).stem in holdout]
    if not held_out:
        raise ValueError(f"holdout: expected stems of at least one of the {len(names)} photos, found none")
    return [name for name in names if Path(name).stem not in holdout], held_out


class PhotoFolder(Dataset[Tensor]):
    """Endless deterministic random crops of the photos of a folder, flipped and turned.

    Photos are drawn by area, positions evenly; crop `i` depends on (`seed`, `i`) and the folder only. A crop
    whose luma survives shrinking by four and back (bicubic) with `sharpness_db` or more is flat or soft, and
    drawn again, except for `flat_fraction` of those. After `tries` draws the sharpest of them is taken.

    Args:
        folder: where the photos are.
        crop: side of a crop in pixels.
        names: which photos, relative to the folder; all by default.
        seed: not negative.
        length: crops in one epoch; the whole area once by default.
        sharpness_db: PSNR bar of the filter; `float("inf")` turns it off.
        flat_fraction: share of the flat crops that is kept, in [0, 1].
        tries: most draws for a crop.
        cache: folder for decoded photos, which are then mapped into memory: for folders larger than memory,
            or shared by many processes. By default decoded photos are held in memory, 3 bytes a pixel.

    Raises:
        TypeError, ValueError: if an argument is of another type or out of range.
        NoPhotosError: if no photo is usable.

    Notes:
        A file that cannot be read, or is smaller than a crop, is left out with a warning that names it.
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
        cache: str | Path | None = None,
    ) -> None:
        check_integer("crop", crop, 8)
        check_integer("seed", seed, 0)
        if length is not None:
            check_integer("length", length, 1)
        check_number("flat_fraction", flat_fraction, 0, 1)
        check_integer("tries", tries, 1)
        self.crop, self.seed, self.tries = crop, seed, tries
        self.sharpness_db, self.flat_fraction = sharpness_db, flat_fraction

        names = photo_names(folder) if names is None else names
        self.names: list[str] = []
        self._photos: list[_Pixels] = []
        left_out: list[str] = []
        for name in names:
            path = Path(folder) / name
            try:
                pixels = _decode(path) if cache is None else _decode_cached(path, Path(cache))
            except ImageFileError as error:
                left_out.append(str(error))
                continue
            if min(pixels.shape[:2]) < crop:
                size = f"{pixels.shape[1]} x {pixels.shape[0]}"
                left_out.append(f"{path}: {size} is smaller than a crop of {crop}")
                continue
            self.names.append(name)
            self._photos.append(pixels)
        if not self._photos:
            first = f" ({left_out[0]})" if left_out else ""
            raise NoPhotosError(
                f"folder: expected photos of at least {crop} x {crop}, "
                f"found none among {len(left_out)} in {str(folder)!r}{first}"
            )
        for reason in left_out:
            warnings.warn(f"photo left out: {reason}", stacklevel=2)
        areas = np.array([pixels.shape[0] * pixels.shape[1] for pixels in self._photos])
        self._cumulative_area = np.cumsum(areas)
        self._length = length or max(1, int(areas.sum()) // crop**2)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        """Crop `index` of the epoch: uint8 `(3, crop, crop)`."""
        if not 0 <= index < self._length:
            raise IndexError(f"index: expected 0 to {self._length - 1}, found {index}")
        return torch.from_numpy(self._draw(index))

    def batch(self, first_index: int, size: int) -> Tensor:
        """Successive crops of the endless stream, float32 `(size, 3, crop, crop)` in [0, 1].

        `first_index` may lie beyond the epoch.
        """
        crops = np.stack([self._draw(index) for index in range(first_index, first_index + size)])
        return torch.from_numpy(crops).float().div_(255)

    def _draw(self, index: int) -> _Pixels:
        rng = np.random.default_rng((self.seed, index))
        best_db, best = np.inf, None
        for _ in range(self.tries):
            crop = self._random_crop(rng)
            detail_db = round_trip_psnr(crop)
            if best is None or detail_db < best_db:
                best_db, best = detail_db, crop
            if detail_db < self.sharpness_db or rng.random() < self.flat_fraction:
                best = crop
                break
        assert best is not None  # tries >= 1
        turned = np.rot90(best, int(rng.integers(4)))
        if rng.random() < 0.5:
            turned = turned[:, ::-1]
        return np.ascontiguousarray(turned.transpose(2, 0, 1))

    def _random_crop(self, rng: np.random.Generator) -> _Pixels:
        area = rng.integers(self._cumulative_area[-1])
        pixels = self._photos[int(np.searchsorted(self._cumulative_area, area, side="right"))]
        top = int(rng.integers(pixels.shape[0] - self.crop + 1))
        left = int(rng.integers(pixels.shape[1] - self.crop + 1))
        return pixels[top : top + self.crop, left : left + self.crop]


def round_trip_psnr(pixels: _Pixels, scale: int = 4) -> float:
    """Detail of uint8 `(H, W, 3)`: the luma PSNR in dB of shrinking and enlarging by bicubic.

    Low means sharp; a flat image has infinity.
    """
    luma = Image.fromarray(np.ascontiguousarray(pixels)).convert("L")
    small = luma.resize((luma.width // scale, luma.height // scale), Image.Resampling.BICUBIC)
    back = small.resize(luma.size, Image.Resampling.BICUBIC)
    error = np.asarray(luma, np.float32) - np.asarray(back, np.float32)
    mse = float(np.square(error).mean())
    return 10 * float(np.log10(255**2 / mse)) if mse else float("inf")


def _decode(path: Path) -> _Pixels:
    """Upright RGB, uint8 `(H, W, 3)`."""
    pixels = to_eight_bit(read_picture(path)).pixels
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.uint8, copy=False)


def _decode_cached(path: Path, cache: Path) -> _Pixels:
    """Map the decoded photo, keyed by path, size and time of change; put it into `cache` first."""
    try:
        status = path.stat()
    except OSError as error:
        raise ImageFileError(path, error.strerror or str(error)) from error
    key = f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    decoded = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    if not decoded.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = decoded.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.save(file, _decode(path))
        partial.replace(decoded)
    mapped: _Pixels = np.load(decoded, mmap_mode="r")
    return mapped
