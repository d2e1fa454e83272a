"""16 bits a channel: what Pillow cannot hold, read through it all the same.

Pillow has no mode for 16-bit colour: it decodes such files but keeps one byte of each sample, and which one
is named by the byte order of the raw mode ("RGB;16B": the first byte of two). Decoding twice, once for each
order, gives both bytes.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ImageFile

Array = npt.NDArray[Any]

_COLOUR = {"RGB": 3, "RGBX": 3, "RGBA": 4, "RGBa": 4}


def raw_mode(image: ImageFile.ImageFile) -> str:
    """Pillow's name for how the samples lie in the file, such as `RGB;16B`; empty where there is none."""
    if not image.tile:
        return ""
    args = image.tile[0].args
    name = args[0] if isinstance(args, tuple) and args else args
    return name if isinstance(name, str) else ""


def is_sixteen_bit(image: ImageFile.ImageFile) -> bool:
    """Whether `read_sixteen_bit` can read the (opened, not yet loaded) image with all its bits."""
    layout, _, order = raw_mode(image).partition(";")
    return image.mode.startswith("I;16") or (order in ("16B", "16L", "16N") and layout in (*_COLOUR, "LA"))


def read_sixteen_bit(image: ImageFile.ImageFile, again: ImageFile.ImageFile) -> Array:
    """Decode an image for which `is_sixteen_bit` holds, not yet loaded, opened twice.

    The samples are (H, W, C) uint16, C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA; alpha is not premultiplied.
    """
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)[..., None]
    layout, _, order = raw_mode(image).partition(";")
    if layout == "LA":
        # Grey + alpha is four bytes a pixel, which a plain RGBA decode hands over as they are.
        _set_raw_mode(image, "RGBA")
        raw = np.asarray(image).astype(np.uint16)
        return (raw[..., 0::2] << 8) | raw[..., 1::2]
    if order == "16N":
        order = "16L" if sys.byteorder == "little" else "16B"
    layout_read = "RGBA" if layout == "RGBa" else layout
    _set_raw_mode(image, f"{layout_read};{order}")
    _set_raw_mode(again, f"{layout_read};{'16L' if order == '16B' else '16B'}")
    pixels = np.asarray(image).astype(np.uint16)
    pixels <<= 8
    pixels |= np.asarray(again)
    pixels = pixels[..., : _COLOUR[layout]]
    return _unpremultiplied(pixels) if layout == "RGBa" else pixels


def _set_raw_mode(image: ImageFile.ImageFile, name: str) -> None:
    image.tile = [
        tile._replace(args=(name, *tile.args[1:]) if isinstance(tile.args, tuple) else name)
        for tile in image.tile
    ]


def _unpremultiplied(pixels: Array) -> Array:
    alpha = pixels[..., 3:].astype(np.float64)
    colour = pixels[..., :3] * 65535.0 / np.maximum(alpha, 1)
    return np.concatenate([np.minimum(colour, 65535).round().astype(np.uint16), pixels[..., 3:]], axis=-1)
