"""Photos to train on: sharp and colourful, so that the crop filter keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_photos(folder: Path, names: tuple[str, ...] = ("a", "b", "held"), side: int = 96) -> Path:
    """Smooth colours with sharp rectangles, one PNG a name."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        rng = np.random.default_rng(seed)
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        pixels = np.array(small.resize((side, side), Image.Resampling.BICUBIC))
        for _ in range(60):
            top, left = rng.integers(0, side - 4, 2)
            height, width = rng.integers(2, 16, 2)
            pixels[top : top + height, left : left + width] = rng.integers(0, 256, 3)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder
