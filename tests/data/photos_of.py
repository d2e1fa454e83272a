"""Small pictures that say which one they are: their red is their number, green and blue are noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, height: int, width: int) -> np.ndarray:
    """uint8 `(height, width, 3)`."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[..., 0] = number
    return pixels


def write(path: Path, number: int, height: int = 32, width: int = 32) -> np.ndarray:
    """A picture in a file, whose suffix says of what kind; its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = picture(number, height, width)
    Image.fromarray(pixels).save(path)
    return pixels
