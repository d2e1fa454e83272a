"""Ten pictures and a spoiled copy of each, the same on every machine: integers of a frozen generator."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Picture = NDArray[np.uint8]

# Height and width: two whole blocks of NIQE at least, and sides that no stride divides.
SIZES = (
    (96, 192),
    (192, 192),
    (193, 289),
    (201, 307),
    (240, 384),
    (97, 299),
    (288, 195),
    (192, 205),
    (221, 223),
    (389, 99),
)


def picture(index: int) -> Picture:
    """`(H, W, 3)`: octaves of smooth noise whose power falls with frequency, as that of photographs."""
    height, width = SIZES[index]
    rng = np.random.RandomState(index)
    total = np.zeros((height, width, 3), dtype=np.int64)
    for octave in range(6):
        side = 2**octave
        cells = 256 * rng.randint(-128, 128, (-(-height // side), -(-width // side), 3))
        layer = cells.repeat(side, axis=0).repeat(side, axis=1)[:height, :width]
        total += side * (_smooth(_smooth(layer, side), side) if side > 1 else layer)
    values = 128 + 4 * total // (63 * 256)
    if index == 3:  # burnt out: a whole block of NIQE and more without any contrast
        values[20:200, 30:230] = 255
    if index == 5:
        values[:] = values[:, :, :1]
    if index == 9:
        values //= 4
    return values.clip(0, 255).astype(np.uint8)


def _smooth(values: NDArray[np.int64], side: int) -> NDArray[np.int64]:
    """Means over boxes of a side."""
    for axis in (0, 1):
        margins = [(0, 0)] * 3
        margins[axis] = (side // 2 + 1, side - 1 - side // 2)
        sums = np.pad(values, margins, mode="edge").cumsum(axis=axis)
        length = values.shape[axis]
        ends, starts = range(side, side + length), range(length)
        values = (sums.take(ends, axis=axis) - sums.take(starts, axis=axis)) // side
    return values


def spoiled(index: int) -> Picture:
    """The picture blurred by a box of three, with noise."""
    values = picture(index).astype(np.int64)
    padded = np.pad(values, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = values.shape[:2]
    blurred = sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3)) // 9
    noise = np.random.RandomState(100 + index).randint(-6, 7, values.shape)
    return (blurred + noise).clip(0, 255).astype(np.uint8)


def small(image: Picture, index: int) -> Picture:
    """A corner of it, of 16 px and more."""
    return image[: 16 + 3 * index, : 37 + 2 * index]


def to_tensor(image: Picture) -> Tensor:
    """`(1, 3, H, W)` in [0, 1]."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255


def digest(image: Picture) -> str:
    """SHA256 of the pixels."""
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
