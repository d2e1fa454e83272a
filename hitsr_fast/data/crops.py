"""Sharp random crops of a set of photos, each a pure function of its key.

Most of a photo is sky, skin or out of focus, and a model that trains on it learns to blur: a crop is kept
only if shrinking it by four loses detail.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from hitsr_fast.checks import check_integer, check_number
from hitsr_fast.data.manifest import Photo, digest_of
from hitsr_fast.imaging.io import ImageFileError, decode_picture, to_eight_bit

_Pixels = npt.NDArray[np.uint8]

DECODED_BYTES: Final = 1 << 30
"""Decoded photos that a process holds; beyond, those not drawn for longest are decoded anew when needed."""

_MOST_BROKEN: Final = 1000  # drawn in a row: then none of the photos can be read


class NoPhotosError(ValueError):
    """No photo of a set can be trained on."""


class PhotoCrops:
    """Sharp random crops of photos, flipped and turned.

    Photos are drawn by area, positions evenly. A crop whose luma survives shrinking by four and back
    (bicubic) with `sharpness_db` or more is flat or soft, and drawn again, except for `flat_fraction` of
    those. After `tries` draws the sharpest of them is taken.

    Photos are decoded when they are drawn. One that turns out to be broken is left out from then on: the
    draw is made again, with the same result wherever and whenever the crop is made.

    Args:
        folder: What the photos' files are relative to.
        photos: Of the set; those with a fault, and those that are smaller than a crop, are left out.
        side: Of the crops, in pixels.
        sharpness_db: PSNR bar of the filter; `float("inf")` turns it off.
        flat_fraction: Share of the flat crops that is kept, in [0, 1].
        tries: Most draws for a crop.
        memory: Most bytes of decoded photos that are held.
        cache: Folder for decoded photos, which are then mapped into memory, once for all processes.

    Attributes:
        digest: Of the names, sizes and contents of `photos`.
        skipped: Reason by file name, of the photos that are left out as far as it is known.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range.
        NoPhotosError: no photo is usable.
    """

    def __init__(
        self,
        folder: str | Path,
        photos: Sequence[Photo],
        side: int,
        *,
        sharpness_db: float = 32.0,
        flat_fraction: float = 0.1,
        tries: int = 8,
        memory: int = DECODED_BYTES,
        cache: str | Path | None = None,
    ) -> None:
        check_integer("crop", side, 8)
        check_number("flat_fraction", flat_fraction, 0, 1)
        check_integer("tries", tries, 1)
        self.folder, self.side, self.tries = Path(folder), side, tries
        self.sharpness_db, self.flat_fraction = sharpness_db, flat_fraction
        self.digest = digest_of(photos)
        self.skipped: dict[str, str] = {}
        self._named: set[str] = set()
        self.photos: list[Photo] = []
        for photo in photos:
            fault = photo.fault
            if not fault and min(photo.width, photo.height) < side:
                fault = f"{photo.width} x {photo.height} is smaller than a crop of {side}"
            if fault:
                self.skipped[self._place(photo)] = fault
            else:
                self.photos.append(photo)
        if not self.photos:
            raise NoPhotosError(
                f"photos: expected some of at least {side} x {side}, "
                f"found none among {len(photos)} in {str(folder)!r}{self._first_skipped()}"
            )
        areas = np.array([photo.width * photo.height for photo in self.photos])
        self._cumulative_area = np.cumsum(areas)
        self._decoded: OrderedDict[int, _Pixels] = OrderedDict()
        self._memory, self._held = memory, 0
        self._cache = None if cache is None else Path(cache)

    @property
    def area(self) -> int:
        """Pixels of all photos."""
        return int(self._cumulative_area[-1])

    def crop(self, seed: int, phase: str, index: int, size: int) -> Tensor:
        """The crop of a key: uint8 `(3, size, size)`, `size` at most `side`.

        Raises:
            NoPhotosError: no photo can be decoded.
        """
        check_integer("size", size, 8, self.side)
        key = int.from_bytes(hashlib.blake2b(phase.encode(), digest_size=8).digest(), "little")
        return torch.from_numpy(self.draw(np.random.default_rng((seed, key, index)), size))

    def draw(self, rng: np.random.Generator, size: int) -> _Pixels:
        """The next crop of a generator, uint8 `(3, size, size)`."""
        best_db, best = np.inf, None
        for _ in range(self.tries):
            crop = self._random_crop(rng, size)
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

    def newly_skipped(self) -> dict[str, str]:
        """Of `skipped` what no call has given before, so that each is named once."""
        fresh = {name: reason for name, reason in self.skipped.items() if name not in self._named}
        self._named |= fresh.keys()
        return fresh

    def __getstate__(self) -> dict[str, object]:
        """Decoded photos stay with the process that decoded them."""
        return {**self.__dict__, "_decoded": OrderedDict(), "_held": 0}

    def _random_crop(self, rng: np.random.Generator, size: int) -> _Pixels:
        for _ in range(_MOST_BROKEN):
            area = rng.integers(self._cumulative_area[-1])
            pixels = self._pixels(int(np.searchsorted(self._cumulative_area, area, side="right")))
            if pixels is None:
                continue
            top = int(rng.integers(pixels.shape[0] - size + 1))
            left = int(rng.integers(pixels.shape[1] - size + 1))
            return pixels[top : top + size, left : left + size]
        raise NoPhotosError(
            f"photos: expected some that can be decoded, found none among {len(self.photos)} in "
            f"{str(self.folder)!r}{self._first_skipped()}"
        )

    def _pixels(self, number: int) -> _Pixels | None:
        """A photo, upright RGB, uint8 `(H, W, 3)`; None if it is broken."""
        pixels = self._decoded.get(number)
        if pixels is not None:
            self._decoded.move_to_end(number)
            return pixels
        photo = self.photos[number]
        if self._place(photo) in self.skipped:
            return None
        try:
            pixels = self._decode(photo) if self._cache is None else self._mapped(photo, self._cache)
        except ImageFileError as error:
            self.skipped[self._place(photo)] = error.reason
            return None
        if min(pixels.shape[:2]) < self.side:
            found = f"{pixels.shape[1]} x {pixels.shape[0]}"
            self.skipped[self._place(photo)] = f"{found} is smaller than a crop of {self.side}"
            return None
        self._decoded[number] = pixels
        self._held += pixels.nbytes
        while self._held > self._memory and len(self._decoded) > 1:
            self._held -= self._decoded.popitem(last=False)[1].nbytes
        return pixels

    def _decode(self, photo: Photo) -> _Pixels:
        path = self.folder / photo.file
        try:
            with path.open("rb") as file:
                file.seek(photo.offset)
                data = file.read(photo.length)
        except OSError as error:
            raise ImageFileError(path, error.strerror or str(error)) from error
        pixels = to_eight_bit(decode_picture(data, self._place(photo))).pixels
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))

    def _mapped(self, photo: Photo, cache: Path) -> _Pixels:
        """The decoded photo, mapped; put into `cache` first, under the digest of its bytes."""
        decoded = cache / f"{photo.digest}.npy"
        if not decoded.exists():
            cache.mkdir(parents=True, exist_ok=True)
            partial = decoded.with_suffix(f".{os.getpid()}.partial")
            with partial.open("wb") as file:
                np.save(file, self._decode(photo))
            partial.replace(decoded)
        mapped: _Pixels = np.load(decoded, mmap_mode="r")
        return mapped

    def _place(self, photo: Photo) -> str:
        return str(self.folder / photo.name)

    def _first_skipped(self) -> str:
        return "".join(f" ({name}: {reason})" for name, reason in list(self.skipped.items())[:1])


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
