"""Random crops of a set of photos, each a pure function of its key.

Most of a photo is sky, skin or out of focus, and a model that trains on it learns to blur: with a bar for
sharpness a crop is kept only if shrinking it by four loses detail.
"""

from __future__ import annotations

import hashlib
import math
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

from hitsr_fast.checks import check_integer
from hitsr_fast.data.manifest import digest_of
from hitsr_fast.data.photo_table import Photo, PhotoTable
from hitsr_fast.data.readers import Reader
from hitsr_fast.data.source_config import PLAIN, CropConfig
from hitsr_fast.imaging.io import ImageFileError, decode_picture, to_eight_bit

Pixels = npt.NDArray[np.uint8]

DECODED_BYTES: Final = 1 << 30
"""Decoded photos that are held; beyond, those not drawn for longest are decoded anew when needed."""

_MOST_BROKEN: Final = 1000  # drawn in a row: then none of the photos can be read


class NoPhotosError(ValueError):
    """No photo of a set can be trained on."""


class Decoded:
    """Decoded photos, up to a number of bytes, though always the last one; empty in another process.

    Args:
        limit: Most bytes that are held.

    Attributes:
        held: Bytes that are held.
    """

    def __init__(self, limit: int = DECODED_BYTES) -> None:
        self.limit, self.held = limit, 0
        self._photos: OrderedDict[tuple[int, int], Pixels] = OrderedDict()

    def get(self, key: tuple[int, int]) -> Pixels | None:
        """What was put there, if it is still held."""
        pixels = self._photos.get(key)
        if pixels is not None:
            self._photos.move_to_end(key)
        return pixels

    def put(self, key: tuple[int, int], pixels: Pixels) -> None:
        """Hold a photo; drop those that were not asked for for longest."""
        self._photos[key] = pixels
        self.held += pixels.nbytes
        while self.held > self.limit and len(self._photos) > 1:
            self.held -= self._photos.popitem(last=False)[1].nbytes

    def __getstate__(self) -> dict[str, object]:
        return {"limit": self.limit, "held": 0, "_photos": OrderedDict()}


class PhotoCrops:
    """Crops of photos, drawn and cut as a `CropConfig` says.

    Photos are decoded when they are drawn. One that turns out to be broken is left out from then on: the
    draw is made again, with the same result wherever and whenever the crop is made.

    Args:
        reader: Of the photos' bytes.
        photos: Of the set; those with a fault are left out.
        side: Of the crops, in pixels.
        config: How they are drawn and cut.
        decoded: Holds decoded photos, as far as they are cut the same for each crop.
        cache: Folder for decoded photos, which are then mapped into memory, once for all processes.
        name: Of the set where it is one of several: it stands before its photos in `skipped`, and those that
            are left out as too small are counted only.

    Attributes:
        digest: Of the names, sizes, heads and tails of `photos`.
        skipped: Reason by file, of the photos that are left out as far as it is known.
        counts: "images" that crops are drawn from; those of them that are "enlarged" or "reflected"; and of
            those that are not "too small" or with a "fault", as far as their heads show.

    Raises:
        ValueError: an argument is out of range.
        NoPhotosError: no photo is usable.
    """

    def __init__(
        self,
        reader: Reader,
        photos: Sequence[Photo],
        side: int,
        config: CropConfig = PLAIN,
        *,
        decoded: Decoded | None = None,
        cache: str | Path | None = None,
        name: str = "",
    ) -> None:
        check_integer("crop", side, 8)
        if config.cut == "resize-centre" and config.centre != side:
            raise ValueError(f"centre: expected the {side} of the model's crops, found {config.centre}")
        self.reader, self.side, self.config, self.name = reader, side, config, name
        self.decoded = Decoded() if decoded is None else decoded
        self.digest = digest_of(photos)
        self.skipped: dict[str, str] = {}
        self._named: set[str] = set()
        table = PhotoTable.of(photos)
        sound, small = table.sound, table.shorter_sides < side
        left_out = sound & small if config.small == "leave out" else np.zeros_like(small)
        for row in np.flatnonzero(~sound if name else ~sound | left_out).tolist():
            photo = table[row]
            self.skipped[self._place(photo)] = photo.fault or self._too_small(photo.width, photo.height)
        self.photos = table.take(np.flatnonzero(sound & ~left_out))
        self.counts = {"images": len(self.photos)}
        centred = config.cut == "resize-centre"
        if centred or config.small != "leave out":
            done = "reflected" if config.small == "reflect" else "enlarged"
            bar = config.shorter_side if centred else side
            self.counts[done] = int((self.photos.shorter_sides < bar).sum())
        self.counts |= {"too small": int(left_out.sum()), "fault": int((~sound).sum())}
        if not len(self.photos):
            least = f"of at least {side} x {side}" if config.small == "leave out" else "that can be read"
            found = f"found none among {len(photos)} in {reader.name!r}"
            raise NoPhotosError(f"photos: expected some {least}, {found}{self._first_skipped()}")
        areas = self.photos.numbers[:, 2] * self.photos.numbers[:, 3]
        self._cumulative_area = np.cumsum(areas)
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
        return torch.from_numpy(self.draw(generator(seed, phase, index), size))

    def draw(self, rng: np.random.Generator, size: int) -> Pixels:
        """The next crop of a generator, uint8 `(3, size, size)`."""
        config = self.config
        best_db, best = np.inf, None
        for _ in range(config.tries if config.sharpness_db is not None else 1):
            crop = self._random_crop(rng, size)
            if config.sharpness_db is None:
                best = crop
                break
            detail_db = round_trip_psnr(crop)
            if best is None or detail_db < best_db:
                best_db, best = detail_db, crop
            if detail_db < config.sharpness_db or rng.random() < config.flat_fraction:
                best = crop
                break
        assert best is not None  # tries >= 1
        turned = np.rot90(best, int(rng.integers(4))) if config.turns else best
        if config.flip and rng.random() < 0.5:
            turned = turned[:, ::-1]
        return np.ascontiguousarray(turned.transpose(2, 0, 1))

    def newly_skipped(self) -> dict[str, str]:
        """Of `skipped` what no call has given before, so that each is named once."""
        fresh = {name: reason for name, reason in self.skipped.items() if name not in self._named}
        self._named |= fresh.keys()
        return fresh

    def _random_crop(self, rng: np.random.Generator, size: int) -> Pixels:
        for _ in range(_MOST_BROKEN):
            if self.config.draw == "area":
                area = rng.integers(self._cumulative_area[-1])
                row = int(np.searchsorted(self._cumulative_area, area, side="right"))
            else:
                row = int(rng.integers(len(self.photos)))
            pixels = self._pixels(row)
            if pixels is None:
                continue
            height, width = pixels.shape[:2]
            if self.config.cut == "resize-centre":
                top, left = (height - size) // 2, (width - size) // 2
            else:
                top, left = (int(rng.integers(length - size + 1)) for length in (height, width))
            return pixels[top : top + size, left : left + size]
        raise NoPhotosError(
            f"photos: expected some that can be decoded, found none among {len(self.photos)} in "
            f"{self.reader.name!r}{self._first_skipped()}"
        )

    def _pixels(self, row: int) -> Pixels | None:
        """What crops of a photo are cut from, uint8 `(H, W, 3)` of at least `side`; None if it is broken."""
        pixels = self.decoded.get((id(self), row))
        if pixels is not None:
            return pixels
        photo = self.photos[row]
        place = self._place(photo)
        if place in self.skipped:
            return None
        try:
            pixels = self._decode(photo) if self._cache is None else self._mapped(photo, self._cache)
        except ImageFileError as error:
            self.skipped[place] = error.reason
            return None
        if min(pixels.shape[:2]) < self.side and self.config.small == "leave out":
            self.skipped[place] = self._too_small(pixels.shape[1], pixels.shape[0])
            return None
        pixels = self._prepared(pixels)
        self.decoded.put((id(self), row), pixels)
        return pixels

    def _prepared(self, pixels: Pixels) -> Pixels:
        """What of cutting is the same for all crops of a photo."""
        if self.config.cut == "resize-centre":
            return _centre(_resized(pixels, self.config.shorter_side), self.side)
        if min(pixels.shape[:2]) >= self.side:
            return pixels
        if self.config.small == "enlarge":
            return _resized(pixels, self.side)
        bottom, right = (max(0, self.side - length) for length in pixels.shape[:2])
        return np.pad(pixels, ((0, bottom), (0, right), (0, 0)), mode="reflect")

    def _decode(self, photo: Photo) -> Pixels:
        return decoded_rgb(self.reader.read(photo), self.reader.place(photo))

    def _mapped(self, photo: Photo, cache: Path) -> Pixels:
        """The decoded photo, mapped; put into `cache` first, under its name, size, head and tail."""
        key = f"{photo.name}\0{photo.length}\0{photo.digest}".encode("utf-8", "surrogateescape")
        decoded = cache / f"{hashlib.blake2b(key, digest_size=16).hexdigest()}.npy"
        if not decoded.exists():
            cache.mkdir(parents=True, exist_ok=True)
            partial = decoded.with_suffix(f".{os.getpid()}.partial")
            with partial.open("wb") as file:
                np.save(file, self._decode(photo))
            partial.replace(decoded)
        mapped: Pixels = np.load(decoded, mmap_mode="r")
        return mapped

    def _place(self, photo: Photo) -> str:
        place = self.reader.place(photo)
        return f"{self.name}: {place}" if self.name else place

    def _too_small(self, width: int, height: int) -> str:
        return f"{width} x {height} is smaller than a crop of {self.side}"

    def _first_skipped(self) -> str:
        return "".join(f" ({name}: {reason})" for name, reason in list(self.skipped.items())[:1])


def generator(seed: int, phase: str, index: int, *more: int) -> np.random.Generator:
    """The random numbers of a key."""
    key = int.from_bytes(hashlib.blake2b(phase.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng((seed, key, index, *more))


def decoded_rgb(data: bytes, place: str) -> Pixels:
    """An image file as upright RGB, uint8 `(H, W, 3)`; its alpha and its colour profile are not looked at.

    Raises:
        ImageFileError: it cannot be decoded.
    """
    pixels = to_eight_bit(decode_picture(data, place)).pixels
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def round_trip_psnr(pixels: Pixels, scale: int = 4) -> float:
    """Detail of uint8 `(H, W, 3)`: the luma PSNR in dB of shrinking and enlarging by bicubic.

    Low means sharp; a flat image has infinity.
    """
    luma = Image.fromarray(np.ascontiguousarray(pixels)).convert("L")
    small = luma.resize((luma.width // scale, luma.height // scale), Image.Resampling.BICUBIC)
    back = small.resize(luma.size, Image.Resampling.BICUBIC)
    error = np.asarray(luma, np.float32) - np.asarray(back, np.float32)
    mse = float(np.square(error).mean())
    return 10 * float(np.log10(255**2 / mse)) if mse else math.inf


def _resized(pixels: Pixels, shorter_side: int) -> Pixels:
    """Pillow's Lanczos, antialiased; the longer side rounded down."""
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    size = (width * shorter_side // shorter, height * shorter_side // shorter)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _centre(pixels: Pixels, side: int) -> Pixels:
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])
