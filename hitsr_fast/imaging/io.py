"""Image files in, with what a photo carries besides its colours: alpha, depth, ICC profile, EXIF."""

from __future__ import annotations

import io
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from hitsr_fast.imaging.sixteen_bit import Array, is_sixteen_bit, read_sixteen_bit

Format = Literal["png", "jpg", "webp", "tiff"]

# Pillow's own hard limit, about 179 megapixels.
MAX_PIXELS = 178_956_970

_ROWS_AT_ONCE = 256

# What Pillow's decoders raise on files that are broken in one way or another.
_DECODE_ERRORS = (
    *(OSError, EOFError, MemoryError, RuntimeError, struct.error, zlib.error),
    *(SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
)

_ORIENTATION = 274
# TIFF tags that describe how the samples lie in a file, which a new file states anew, and blocks that
# describe the old pixels.
_LAYOUT_TAGS = frozenset(
    {*range(254, 260), 262, 266, 273, *range(277, 280), 284, 317, 320, *range(322, 326), 330, 338, 339, 347}
    | {513, 514, *range(529, 533), 700, 33723, 34377, 34675}
)
# Orientation -> (transpose, flip rows, flip columns), applied in this order.
_UPRIGHT = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}

_pixel_limit_lock = threading.Lock()


class ImageFileError(Exception):
    """An image file that cannot be read or written; `str()` of it is one line that names the file."""

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path = Path(path)
        self.reason = " ".join(reason.split())
        super().__init__(f"{self.path}: {self.reason}")


@dataclass(frozen=True)
class Picture:
    """A decoded image: upright integer samples and what came with them.

    `pixels` is (H, W, 1) grey or (H, W, 3) RGB, `alpha` (H, W) or None and not premultiplied; both uint8, or
    both uint16. `exif` is a TIFF structure whose orientation is 1. `notes` says in words what of the file was
    not kept.
    """

    pixels: Array
    alpha: Array | None = None
    icc_profile: bytes | None = None
    exif: bytes | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.pixels.dtype not in (np.uint8, np.uint16):
            raise TypeError(f"pixels: expected uint8 or uint16, found {self.pixels.dtype}")
        if self.pixels.ndim != 3 or self.pixels.shape[2] not in (1, 3) or 0 in self.pixels.shape:
            raise ValueError(f"pixels: expected shape (H, W, 1) or (H, W, 3), found {self.pixels.shape}")
        dtype, shape, alpha = self.pixels.dtype, self.pixels.shape[:2], self.alpha
        if alpha is not None and (alpha.dtype, alpha.shape) != (dtype, shape):
            found = f"{alpha.dtype} of shape {alpha.shape}"
            raise ValueError(f"alpha: expected {dtype} of shape {shape}, found {found}")

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.pixels.shape[1])

    @property
    def max_value(self) -> int:
        """The sample that stands for 1.0: 255 or 65535."""
        return int(np.iinfo(self.pixels.dtype).max)

    @property
    def samples(self) -> Array:
        """(H, W, 1..4): the pixels, with alpha as the last channel where there is one."""
        if self.alpha is None:
            return self.pixels
        return np.concatenate([self.pixels, self.alpha[..., None]], axis=-1)

    def rows(self, begin: int, end: int) -> Picture:
        """Those rows, as a view."""
        alpha = None if self.alpha is None else self.alpha[begin:end]
        return replace(self, pixels=self.pixels[begin:end], alpha=alpha)


def read_picture(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read an image file in any format that Pillow decodes.

    Args:
        path: the file.
        max_pixels: a larger image is refused before it is decoded.

    Returns:
        The picture, upright, grey or RGB: bilevel becomes grey; palette, CMYK (through its profile) and
        others become RGB. Grey, RGB and RGBA files of 16 bits keep them.

    Raises:
        ImageFileError: missing, empty, not an image, truncated, too large, or not supported.
    """
    path = Path(path)
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            raise ImageFileError(path, "is a folder, not an image")
        if not stat.S_ISREG(kind):  # to read a pipe or a device could take forever
            raise ImageFileError(path, "is not a regular file")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ImageFileError(path, "no such file") from None
    except OSError as error:
        raise ImageFileError(path, f"cannot be read: {error.strerror}") from error
    return decode_picture(data, path, max_pixels=max_pixels)


def decode_picture(data: bytes, path: Path | str, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """`read_picture` of a file's bytes; `path` is how errors name it."""
    with _opened(data, Path(path), max_pixels) as image:
        if is_sixteen_bit(image):
            with Image.open(io.BytesIO(data)) as again:
                return _sixteen_bit_picture(image, again)
        image.load()
        return picture_from_pil(image)


def picture_size(data: bytes, path: Path | str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height as the head of a file says, not yet upright; errors are those of `read_picture`."""
    with _opened(data, Path(path), max_pixels) as image:
        return image.width, image.height


@contextmanager
def _opened(data: bytes, path: Path, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """The image of a file's bytes, of allowed size; what goes wrong with it is an ImageFileError."""
    if not data:
        raise ImageFileError(path, "the file is empty")
    try:
        with _no_pillow_pixel_limit(), Image.open(io.BytesIO(data)) as image:
            if 0 in image.size:
                raise ImageFileError(path, f"has no pixels: {image.width} x {image.height}")
            if image.width * image.height > max_pixels:
                raise ImageFileError(
                    path, f"{image.width} x {image.height} is more than the limit of {max_pixels:,} pixels"
                )
            yield image
    except UnidentifiedImageError:
        raise ImageFileError(path, "is not an image, or of a format that cannot be read") from None
    except _DECODE_ERRORS as error:
        raise ImageFileError(
            path, f"broken or unsupported image: {str(error) or type(error).__name__}"
        ) from error


@contextmanager
def _no_pillow_pixel_limit() -> Iterator[None]:
    """Lift Pillow's process-wide limit while a file is read whose size is checked here."""
    with _pixel_limit_lock:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def picture_from_pil(image: Image.Image) -> Picture:
    """Take a picture out of a PIL image (its first frame); see `read_picture`.

    Raises:
        ValueError: if the image has no pixels or a mode that has no 8- or 16-bit equivalent.
    """
    notes = _frame_notes(image)
    icc_profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and not 0 <= values.min() <= values.max() <= 65535:
            raise ValueError(
                f"image: mode {image.mode} holds {values.min()}..{values.max()}, expected 0..65535"
            )
        samples = values.astype(np.uint16)[..., None]
    elif image.mode in ("1", "L", "LA", "La"):
        keep = image.mode != "1" and image.mode != "L"
        samples = _samples_as(image, "LA" if keep or "transparency" in image.info else "L")
    elif image.mode in ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr", "HSV"):
        has_alpha = image.mode in ("PA", "RGBA", "RGBa") or "transparency" in image.info
        samples = _samples_as(image, "RGBA" if has_alpha else "RGB")
    elif image.mode == "CMYK":
        converted, icc_profile, note = _rgb_of_cmyk(image, icc_profile)
        samples, notes = np.asarray(converted), (*notes, *note)
    else:
        raise ValueError(f"image: mode {image.mode} is not supported")
    return _picture(samples, image, icc_profile, notes)


def _samples_as(image: Image.Image, mode: str) -> Array:
    """The (H, W, C) uint8 samples in a mode, by strips: converted whole, an image is there four times."""
    samples = np.empty((image.height, image.width, Image.getmodebands(mode)), np.uint8)
    for top in range(0, image.height, _ROWS_AT_ONCE):
        strip = samples[top : top + _ROWS_AT_ONCE]
        converted = image.crop((0, top, image.width, top + len(strip))).convert(mode)
        strip[:] = np.asarray(converted).reshape(strip.shape)
    return samples


def _sixteen_bit_picture(image: ImageFile.ImageFile, again: ImageFile.ImageFile) -> Picture:
    samples = read_sixteen_bit(image, again)
    transparent = image.info.get("transparency")
    if transparent is not None and samples.shape[-1] in (1, 3):
        opaque = (samples != np.asarray(transparent, np.uint16)).any(axis=-1, keepdims=True)
        samples = np.concatenate([samples, opaque * np.uint16(65535)], axis=-1)
    return _picture(samples, image, image.info.get("icc_profile"), _frame_notes(image))


def _picture(
    samples: Array, image: Image.Image, icc_profile: bytes | None, notes: tuple[str, ...]
) -> Picture:
    orientation, exif = 1, None
    try:
        tags = image.getexif()
        orientation = tags.get(_ORIENTATION, 1)
        for tag in _LAYOUT_TAGS & set(tags):
            del tags[tag]
        if tags:
            tags[_ORIENTATION] = 1
            exif = tags.tobytes()
    except _DECODE_ERRORS:
        notes = (*notes, "its EXIF data is broken and was dropped")
    if orientation in _UPRIGHT:
        transpose, flip_rows, flip_columns = _UPRIGHT[orientation]
        samples = samples.swapaxes(0, 1) if transpose else samples
        samples = samples[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    has_alpha = samples.shape[-1] in (2, 4)
    return Picture(
        pixels=np.ascontiguousarray(samples[..., :-1] if has_alpha else samples),
        alpha=np.ascontiguousarray(samples[..., -1]) if has_alpha else None,
        icc_profile=icc_profile or None,
        exif=exif,
        notes=notes,
    )


def _frame_notes(image: Image.Image) -> tuple[str, ...]:
    frames = getattr(image, "n_frames", 1)
    # The further frames of a multi-picture JPEG are previews and depth maps of the same photo.
    if frames == 1 or getattr(image, "format", None) == "MPO":
        return ()
    return (f"has {frames} frames; only the first is used",)


def _rgb_of_cmyk(
    image: Image.Image, profile: bytes | None
) -> tuple[Image.Image, bytes | None, tuple[str, ...]]:
    if profile is None:
        return image.convert("RGB"), None, ()
    srgb = ImageCms.createProfile("sRGB")
    try:
        converted = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB"), None, ("its CMYK profile is broken; colours are approximate",)
    if converted is None:
        raise ValueError("image: CMYK conversion gave no image")
    return converted, ImageCms.ImageCmsProfile(srgb).tobytes(), ()


def picture_to_pil(picture: Picture) -> Image.Image:
    """A PIL image of the same samples, profile and EXIF.

    Notes:
        Pillow has no 16-bit colour: of a 16-bit picture with colour or alpha the 8 leading bits are kept.
    """
    if picture.max_value == 65535 and (picture.pixels.shape[2] == 3 or picture.alpha is not None):
        picture = to_eight_bit(picture)
    image = samples_to_pil(picture.samples)
    if picture.icc_profile:
        image.info["icc_profile"] = picture.icc_profile
    if picture.exif:
        image.info["exif"] = picture.exif
    return image


def samples_to_pil(samples: Array) -> Image.Image:
    """A PIL image of (H, W, C) samples: uint8, or uint16 where C is 1."""
    return Image.fromarray(np.ascontiguousarray(samples[..., 0] if samples.shape[-1] == 1 else samples))


def to_eight_bit(picture: Picture) -> Picture:
    """The picture with 8-bit samples, rounded to nearest."""
    if picture.max_value == 255:
        return picture

    def reduced(samples: Array) -> Array:
        # round(v * 255 / 65535) = (v + 128) // 257, in uint32 for the carry
        return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)

    alpha = None if picture.alpha is None else reduced(picture.alpha)
    return replace(picture, pixels=reduced(picture.pixels), alpha=alpha)
