"""16 bits a channel: what Pillow cannot hold, read through it and written without it (TIFF of 8 bits too).

Pillow has no mode for 16-bit colour: it decodes such files but keeps one byte of each sample, and which one
is named by the byte order of the raw mode ("RGB;16B": the first byte of two). Decoding twice, once for each
order, gives both bytes.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import ImageFile, TiffImagePlugin

Array = npt.NDArray[Any]

_COLOUR = {"RGB": 3, "RGBX": 3, "RGBA": 4, "RGBa": 4}
_ROWS_AT_ONCE = 256


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
    """Decode an image for which `is_sixteen_bit` holds.

    Args:
        image: opened, not loaded.
        again: the same file opened once more.

    Returns:
        (H, W, C) uint16, C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA; alpha is not premultiplied.
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


def write_png16(file: IO[bytes], pixels: Array, *, icc_profile: bytes | None, exif: bytes | None) -> None:
    """Write a 16-bit PNG.

    Args:
        file: opened for binary writing.
        pixels: (H, W, C) uint16, C as `read_sixteen_bit` returns it.
        icc_profile: embedded as iCCP.
        exif: a TIFF structure, with or without the leading `Exif\\0\\0`; embedded as eXIf.
    """
    height, width, channels = pixels.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    file.write(b"\x89PNG\r\n\x1a\n")
    _write_chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    if icc_profile:
        _write_chunk(file, b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile))
    if exif:
        _write_chunk(file, b"eXIf", exif.removeprefix(b"Exif\0\0"))
    for part in _deflated(_png_rows(pixels)):
        _write_chunk(file, b"IDAT", part)
    _write_chunk(file, b"IEND", b"")


def _write_chunk(file: IO[bytes], name: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))


def _png_rows(pixels: Array) -> Iterator[bytes]:
    height, width, channels = pixels.shape
    step = 2 * channels
    for top in range(0, height, _ROWS_AT_ONCE):
        raw = pixels[top : top + _ROWS_AT_ONCE].astype(">u2").view(np.uint8).reshape(-1, width * step)
        rows = np.ones((len(raw), 1 + width * step), np.uint8)  # first byte of a row: filter 1, "sub"
        rows[:, 1 : 1 + step] = raw[:, :step]
        np.subtract(raw[:, step:], raw[:, :-step], out=rows[:, 1 + step :])
        yield rows.tobytes()


def _deflated(parts: Iterator[bytes]) -> Iterator[bytes]:
    compressor = zlib.compressobj()
    for part in parts:
        if done := compressor.compress(part):
            yield done
    yield compressor.flush()


def write_tiff(file: IO[bytes], pixels: Array, *, icc_profile: bytes | None, exif: Mapping[int, Any]) -> None:
    """Write a TIFF: little-endian, one strip, deflate with the horizontal predictor.

    Args:
        file: opened for binary writing.
        pixels: (H, W, C) uint8 or uint16, C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA.
        icc_profile: embedded as tag 34675.
        exif: further tags of the directory; an Exif or GPS directory is a dict of its own.

    Notes:
        Pillow's writer, where it compresses, cannot write an Exif directory.
    """
    height, width, channels = pixels.shape
    strip = b"".join(_deflated(_tiff_rows(pixels)))
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in exif.items():
        directory[tag] = value
    directory[256], directory[257] = width, height
    directory[258] = (8 * pixels.itemsize,) * channels  # BitsPerSample
    directory[259] = 8  # Compression: deflate
    directory[262] = 2 if channels >= 3 else 1  # Photometric: RGB or black is zero
    directory[277] = channels
    directory[278] = height  # RowsPerStrip
    directory[279] = len(strip)
    directory[317] = 2  # Predictor: horizontal differences
    if channels in (2, 4):
        directory[338] = 2  # ExtraSamples: alpha, not premultiplied
    if icc_profile:
        directory.tagtype[34675] = 7
        directory[34675] = icc_profile
    directory[273] = 0  # StripOffsets: counted by Pillow from the end of the directory
    directory.save(file)
    file.write(strip)


def _tiff_rows(pixels: Array) -> Iterator[bytes]:
    for top in range(0, len(pixels), _ROWS_AT_ONCE):
        rows = pixels[top : top + _ROWS_AT_ONCE].astype(pixels.dtype.newbyteorder("<"))
        rows[:, 1:] -= rows[:, :-1].copy()
        yield rows.tobytes()
