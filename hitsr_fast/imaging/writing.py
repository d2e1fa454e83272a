"""Image files out, fed with rows: PNG and TIFF are encoded as the rows come, JPEG and WebP at the end.

A file is written under a temporary name and renamed when it is whole, and those of one image together.
"""

from __future__ import annotations

import os
import secrets
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image, TiffImagePlugin

from hitsr_fast.imaging.io import Format, ImageFileError, Picture, samples_to_pil, to_eight_bit

_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
_EXIF_WIDTH, _EXIF_HEIGHT = 0xA002, 0xA003

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Header:
    """What a file says of itself before its first row. `channels`: 1 grey, 2 with alpha, 3 RGB, 4 RGBA."""

    height: int
    width: int
    channels: int
    dtype: np.dtype[Any]
    icc_profile: bytes | None
    exif: Image.Exif

    @classmethod
    def of(cls, picture: Picture, factor: int) -> Header:
        """That of `picture` enlarged; its EXIF record of the size is brought up to date."""
        height, width = picture.height * factor, picture.width * factor
        exif = Image.Exif()
        if picture.exif:
            exif.load(picture.exif)
            if _EXIF_IFD in exif and _EXIF_WIDTH in (sizes := exif.get_ifd(_EXIF_IFD)):
                sizes[_EXIF_WIDTH], sizes[_EXIF_HEIGHT] = width, height
        channels = picture.pixels.shape[2] + (picture.alpha is not None)
        return cls(height, width, channels, picture.pixels.dtype, picture.icc_profile, exif)


class RowEncoder(Protocol):
    """Encodes the rows of one image into a file opened for binary writing."""

    def add_rows(self, rows: Picture) -> None:
        """Add the next rows, from the top downwards."""

    def finish(self) -> None:
        """Write what is left after the last row."""


class PngEncoder:
    """8 or 16 bits a sample, as the rows have them."""

    def __init__(self, file: IO[bytes], header: Header) -> None:
        self._file = file
        depth, colour_type = 8 * header.dtype.itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[header.channels]
        file.write(b"\x89PNG\r\n\x1a\n")
        size = struct.pack(">IIBBBBB", header.width, header.height, depth, colour_type, 0, 0, 0)
        self._write_chunk(b"IHDR", size)
        if header.icc_profile:
            self._write_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(header.icc_profile))
        if header.exif:
            self._write_chunk(b"eXIf", header.exif.tobytes().removeprefix(b"Exif\0\0"))
        self._compressor = zlib.compressobj()
        self._above = np.zeros(header.width * header.channels * header.dtype.itemsize, np.uint8)

    def add_rows(self, rows: Picture) -> None:
        samples = rows.samples
        big_endian = samples.astype(samples.dtype.newbyteorder(">"), order="C", copy=False)
        raw = big_endian.view(np.uint8).reshape(len(samples), -1)
        filtered = np.empty((len(raw), 1 + raw.shape[1]), np.uint8)
        filtered[:, 0] = 2  # "up": of the single filters, the one that makes enlarged photos smallest
        np.subtract(raw[0], self._above, out=filtered[0, 1:])
        np.subtract(raw[1:], raw[:-1], out=filtered[1:, 1:])
        self._above = raw[-1].copy()
        if part := self._compressor.compress(filtered.data):
            self._write_chunk(b"IDAT", part)

    def finish(self) -> None:
        self._write_chunk(b"IDAT", self._compressor.flush())
        self._write_chunk(b"IEND", b"")

    def _write_chunk(self, name: bytes, data: bytes) -> None:
        crc = zlib.crc32(data, zlib.crc32(name))
        self._file.write(struct.pack(">I", len(data)) + name)
        self._file.write(data)
        self._file.write(struct.pack(">I", crc))


class TiffEncoder:
    """8 or 16 bits a sample, little-endian, one strip, deflate with the horizontal predictor.

    Notes:
        Pillow's writer, where it compresses, cannot write an Exif directory.
    """

    def __init__(self, file: IO[bytes], header: Header) -> None:
        self._file = file
        # Few readers, and Pillow not among them, know 16-bit grey with alpha in a TIFF: it becomes RGBA.
        self._grey_to_rgb = header.channels == 2 and header.dtype == np.uint16
        channels = 4 if self._grey_to_rgb else header.channels
        directory = TiffImagePlugin.ImageFileDirectory_v2()
        for tag, value in header.exif.items():
            directory[tag] = header.exif.get_ifd(tag) if tag in (_EXIF_IFD, _GPS_IFD) else value
        directory[256], directory[257] = header.width, header.height
        directory[258] = (8 * header.dtype.itemsize,) * channels  # BitsPerSample
        directory[259] = 8  # Compression: deflate
        directory[262] = 2 if channels >= 3 else 1  # Photometric: RGB or black is zero
        directory[277] = channels
        directory[278] = header.height  # RowsPerStrip
        directory[279] = 0  # StripByteCounts: known at the end
        directory[317] = 2  # Predictor: horizontal differences
        if channels in (2, 4):
            directory[338] = 2  # ExtraSamples: alpha, not premultiplied
        if header.icc_profile:
            directory.tagtype[34675] = 7
            directory[34675] = header.icc_profile
        directory[273] = 0  # StripOffsets: counted by Pillow from the end of the directory
        directory.save(file)
        self._directory, self._strip_at = directory, file.tell()
        self._compressor = zlib.compressobj()

    def add_rows(self, rows: Picture) -> None:
        samples = rows.samples[..., [0, 0, 0, 1]] if self._grey_to_rgb else rows.samples
        differences = samples.astype(samples.dtype.newbyteorder("<"), order="C")
        differences[:, 1:] -= samples[:, :-1]
        self._file.write(self._compressor.compress(differences.view(np.uint8).data))

    def finish(self) -> None:
        self._file.write(self._compressor.flush())
        self._directory[279] = self._file.tell() - self._strip_at
        self._file.seek(0)
        self._directory.save(self._file)  # as long as it was: a count has four bytes whatever its value


class PillowEncoder:
    """JPEG and WebP: 8 bits, and held until the last row, as Pillow takes whole images only."""

    def __init__(self, file: IO[bytes], header: Header, format: Format) -> None:
        self._file, self._format, self._header = file, format, header
        self._samples = np.empty((header.height, header.width, header.channels), np.uint8)
        self._top = 0

    def add_rows(self, rows: Picture) -> None:
        self._samples[self._top : self._top + rows.height] = to_eight_bit(rows).samples
        self._top += rows.height

    def finish(self) -> None:
        """See `RowEncoder`. JPEG has no alpha: there, it is laid over white."""
        image = samples_to_pil(self._samples)
        if self._format == "jpg" and self._header.channels in (2, 4):
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA")).convert(image.mode[:-1])
        options: dict[str, Any] = {"icc_profile": self._header.icc_profile, "quality": 95}
        if self._header.exif:
            options["exif"] = self._header.exif
        if self._format == "jpg":
            options["subsampling"] = "4:4:4"
        image.save(self._file, "JPEG" if self._format == "jpg" else "WEBP", **options)


class PictureWriter:
    """A file that takes the rows of a picture; made by `picture_writers`."""

    def __init__(self, path: Path, file: IO[bytes], header: Header, format: Format) -> None:
        self.path, self.header = path, header
        self._format: Format = format
        self._file, self._rows = file, 0
        with _faults_of(path, format):
            self._encoder: RowEncoder
            if format == "png":
                self._encoder = PngEncoder(file, header)
            elif format == "tiff":
                self._encoder = TiffEncoder(file, header)
            else:
                self._encoder = PillowEncoder(file, header, format)

    def add_rows(self, rows: Picture) -> None:
        """Add the next rows, from the top downwards.

        Raises:
            ValueError: if they are not of the file's width, channels and depth, or too many.
            ImageFileError: if they cannot be written.
        """
        header = self.header
        found = (rows.width, rows.pixels.shape[2] + (rows.alpha is not None), rows.pixels.dtype)
        if found != (header.width, header.channels, header.dtype):
            expected = f"{header.width} x {header.channels} {header.dtype}"
            raise ValueError(f"rows: expected {expected} samples, found {found[0]} x {found[1]} {found[2]}")
        self._rows += rows.height
        if self._rows > header.height:
            raise ValueError(f"rows: expected {header.height} in all, found {self._rows}")
        with _faults_of(self.path, self._format):
            self._encoder.add_rows(rows)

    def finish(self) -> None:
        """Complete the file, still under its temporary name.

        Raises:
            ValueError: if rows are missing.
            ImageFileError: if it cannot be written.
        """
        if self._rows != self.header.height:
            raise ValueError(f"rows: expected {self.header.height} in all, found {self._rows}")
        with _faults_of(self.path, self._format):
            self._encoder.finish()
            self._file.close()

    def rename(self) -> None:
        """Give the finished file its own name."""
        with _faults_of(self.path, self._format):
            os.replace(self._file.name, self.path)


@contextmanager
def picture_writers(
    targets: Mapping[int, Path], picture: Picture, format: Format, *, overwrite: bool = False
) -> Iterator[dict[int, PictureWriter]]:
    """Open the files of a picture at several factors, to be fed with their rows.

    They get their names when the block ends; if it ends by an exception, none of them is left.

    Args:
        targets: factor -> file; missing folders above it are made.
        picture: the picture at x1; its rows at `factor` times its size are what that writer takes.
        format: see `write_picture`, as for `overwrite`.

    Yields:
        factor -> writer.

    Raises:
        ImageFileError: a file exists, or cannot be written.
    """
    for path in targets.values():
        if os.path.exists(path) and not overwrite:
            raise ImageFileError(path, "exists already")
    with ExitStack() as stack:
        writers = {
            factor: PictureWriter(
                path, stack.enter_context(_temporary_for(path, format)), Header.of(picture, factor), format
            )
            for factor, path in targets.items()
        }
        yield writers
        for writer in writers.values():
            writer.finish()
        for writer in writers.values():
            writer.rename()


def write_picture(path: Path | str, picture: Picture, format: Format, *, overwrite: bool = False) -> None:
    """Write a picture, whole or not at all: under a temporary name in the same folder, then renamed.

    PNG and TIFF keep 16 bits; JPEG and WebP reduce to 8, and JPEG lays alpha over white. The format is the
    file's, whatever its name says; missing folders above it are made.

    Raises:
        ImageFileError: the file exists, or cannot be written.
    """
    with picture_writers({1: Path(path)}, picture, format, overwrite=overwrite) as writers:
        for top in range(0, picture.height, _ROWS_AT_ONCE):
            writers[1].add_rows(picture.rows(top, top + _ROWS_AT_ONCE))


@contextmanager
def _temporary_for(path: Path, format: Format) -> Iterator[IO[bytes]]:
    """A new file in the folder of `path`, open for writing; removed in the end unless it was renamed."""
    # Not made of the file's own name, which may already be as long as names can be.
    temporary = path.with_name(f".hitsr-fast-{secrets.token_hex(8)}.part")
    with _faults_of(path, format):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = temporary.open("xb")
    try:
        yield file
    finally:
        # Of a file that was renamed nothing is left to do; one that failed has said so before.
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def _faults_of(path: Path, format: Format) -> Iterator[None]:
    """Turn what goes wrong while a file is written into an `ImageFileError` that names it."""
    try:
        yield
    except OSError as error:
        raise ImageFileError(path, f"cannot be written: {error.strerror or error}") from error
    except (ValueError, struct.error) as error:
        raise ImageFileError(path, f"cannot be written as {format}: {error}") from error
