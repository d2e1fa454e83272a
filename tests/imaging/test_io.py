"""Image files: what goes in comes out, and what is broken is named."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from hitsr_fast.imaging.io import (
    Format,
    ImageFileError,
    Picture,
    picture_from_pil,
    picture_to_pil,
    read_picture,
    to_eight_bit,
)
from hitsr_fast.imaging.writing import PngEncoder, picture_writers, write_picture

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def samples(h: int, w: int, c: int, dtype: Any, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (h, w, c), dtype=dtype)


def picture(h: int, w: int, channels: int, dtype: Any, seed: int = 0, **carried: Any) -> Picture:
    all_samples = samples(h, w, channels, dtype, seed)
    if channels in (2, 4):
        return Picture(all_samples[..., :-1], all_samples[..., -1], **carried)
    return Picture(all_samples, **carried)


def same_samples(a: Picture, b: Picture) -> bool:
    return a.samples.dtype == b.samples.dtype and np.array_equal(a.samples, b.samples)


@settings(max_examples=40, deadline=None)
@given(
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    channels=st.integers(1, 4),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    format=st.sampled_from(["png", "tiff"]),
    seed=st.integers(0, 99),
)
def test_lossless_formats_return_every_sample(
    tmp_path_factory: pytest.TempPathFactory,
    h: int,
    w: int,
    channels: int,
    dtype: Any,
    format: Format,
    seed: int,
) -> None:
    path = tmp_path_factory.mktemp("io") / f"image.{format}"
    written = picture(h, w, channels, dtype, seed, icc_profile=PROFILE)
    write_picture(path, written, format)
    read = read_picture(path)
    if format == "tiff" and channels == 2 and dtype is np.uint16:  # written as RGBA, which readers know
        written = Picture(written.pixels.repeat(3, axis=2), written.alpha)
    assert same_samples(read, written)
    assert read.icc_profile == PROFILE


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("extra", [None, 1, 2])
@pytest.mark.parametrize("compressed", [False, True])
def test_sixteen_bit_tiff_of_either_byte_order(
    tmp_path: Path, order: str, extra: int | None, compressed: bool
) -> None:
    pixels = samples(5, 4, 3 if extra is None else 4, np.uint16)
    if extra == 1:  # premultiplied: opaque and half-transparent pixels
        pixels[..., 3] = np.where(pixels[..., 3] > 30000, 65535, 32768)
        pixels[..., :3] //= 2
    path = tmp_path / "image.tif"
    path.write_bytes(tiff16(pixels, order, extra, compressed))
    read = read_picture(path)
    expected = pixels.astype(np.float64)
    if extra == 1:
        expected[..., :3] = np.minimum(expected[..., :3] * 65535 / expected[..., 3:], 65535).round()
    assert read.samples.dtype == np.uint16
    assert np.array_equal(read.samples, expected)


def tiff16(pixels: np.ndarray[Any, Any], order: str, extra: int | None, compressed: bool) -> bytes:
    h, w, c = pixels.shape
    data = pixels.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if compressed else data
    tags = [
        (256, 3, (w,)),
        (257, 3, (h,)),
        (258, 3, (16,) * c),
        (259, 3, (8 if compressed else 1,)),
        (262, 3, (2,)),
    ]
    tags += [(273, 4, (8,)), (277, 3, (c,)), (278, 3, (h,)), (279, 4, (len(data),))]
    tags += [] if extra is None else [(338, 3, (extra,))]
    data += b"\0" * (len(data) % 2)
    heap_at = 8 + len(data) + 2 + 12 * len(tags) + 4
    directory, heap = struct.pack(f"{order}H", len(tags)), b""
    for tag, kind, values in tags:
        value = b"".join(struct.pack(order + {3: "H", 4: "I"}[kind], v) for v in values)
        if len(value) > 4:
            value, heap = struct.pack(f"{order}I", heap_at + len(heap)), heap + value
        directory += struct.pack(f"{order}HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(data))
    return start + data + directory + b"\0\0\0\0" + heap


def test_sixteen_bit_colour_key_becomes_alpha(tmp_path: Path) -> None:
    pixels = samples(2, 3, 3, np.uint16)
    path = tmp_path / "keyed.png"
    write_picture(path, Picture(pixels), "png")
    data = path.read_bytes()
    body = b"tRNS" + pixels[0, 0].astype(">u2").tobytes()
    key = struct.pack(">I", 6) + body + struct.pack(">I", zlib.crc32(body))
    at = data.index(b"IDAT") - 4
    path.write_bytes(data[:at] + key + data[at:])
    read = read_picture(path)
    assert read.alpha is not None and read.alpha[0, 0] == 0 and (read.alpha == 65535).sum() == 5


@pytest.mark.parametrize(
    ("mode", "channels", "alpha"),
    [("1", 1, False), ("L", 1, False), ("LA", 1, True), ("P", 3, False), ("PA", 3, True), ("RGB", 3, False),
     ("RGBA", 3, True), ("CMYK", 3, False), ("YCbCr", 3, False)],
)  # fmt: skip
def test_every_mode_becomes_grey_or_rgb(mode: str, channels: int, alpha: bool) -> None:
    image = Image.fromarray(samples(4, 6, 3, np.uint8)).convert(
        "P" if mode == "PA" else mode if mode != "LA" else "L"
    )
    image = image.convert(mode)
    read = picture_from_pil(image)
    assert read.pixels.shape == (4, 6, channels) and read.pixels.dtype == np.uint8
    assert (read.alpha is not None) is alpha
    expected = (
        image
        if mode in ("L", "LA", "RGB", "RGBA")
        else image.convert(("L" if channels == 1 else "RGB") + "A" * alpha)
    )
    assert np.array_equal(read.samples.squeeze(), np.asarray(expected))


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (3, 2), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "p.png", transparency=0)
    read = read_picture(tmp_path / "p.png")
    assert read.alpha is not None and read.alpha[0, 0] == 0 and read.alpha[1, 2] == 255
    assert read.pixels[1, 2].tolist() == [0, 255, 0]


def test_unsupported_modes_are_named(tmp_path: Path) -> None:
    Image.new("F", (2, 2)).save(tmp_path / "float.tif")
    with pytest.raises(ImageFileError, match=r"float\.tif: .*mode F is not supported"):
        read_picture(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"holds -1\.\.-1, expected 0\.\.65535"):
        picture_from_pil(Image.new("I", (1, 1), -1))


def test_sixteen_bit_grey_round_trips_through_pil() -> None:
    written = picture(3, 4, 1, np.uint16)
    assert same_samples(picture_from_pil(picture_to_pil(written)), written)


def test_eight_bit_reduction_rounds_to_nearest() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    assert np.array_equal(to_eight_bit(Picture(values)).pixels, np.round(values / 257).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["png", "jpg", "webp", "tiff"])
def test_orientation_is_applied_and_other_exif_kept(tmp_path: Path, orientation: int, format: Format) -> None:
    stored = np.zeros((8, 16, 3), np.uint8)
    stored[:4, :8] = 255  # the stored upper left quarter is white
    exif = Image.Exif()
    exif[274], exif[271], exif[256] = orientation, "Maker", 16
    exif.get_ifd(0x8769)[0xA002], exif.get_ifd(0x8769)[0xA003] = 16, 8
    exif.get_ifd(0x8769)[0x9003] = "2020:01:02 03:04:05"
    source = tmp_path / "in.jpg"
    Image.fromarray(stored).save(source, quality=100, exif=exif, icc_profile=PROFILE)
    read = read_picture(source)
    upright = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    assert (read.height, read.width) == ((8, 16) if orientation < 5 else (16, 8))
    quarter = read.pixels[
        (0 if upright[0] == "t" else read.height // 2) :, (0 if upright[1] == "l" else read.width // 2) :
    ][: read.height // 2, : read.width // 2]
    assert quarter.min() > 200

    for depth, data in (("8", read.pixels), ("16", read.pixels.astype(np.uint16) * 257)):
        target = tmp_path / f"out{depth}.{format}"
        write_picture(target, Picture(data, None, read.icc_profile, read.exif), format)
        with Image.open(target) as image:
            assert image.info["icc_profile"] == PROFILE
            tags = image.getexif()
            assert tags.get(274) == 1 and tags.get(271) == "Maker"
            inner = tags.get_ifd(0x8769)
            assert (inner[0xA002], inner[0xA003]) == image.size
            assert inner[0x9003] == "2020:01:02 03:04:05"


def test_cmyk_goes_through_its_profile_or_says_that_it_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "cmyk.jpg"
    Image.new("CMYK", (4, 4), (0, 200, 0, 0)).save(path, icc_profile=b"no profile at all")
    read = read_picture(path)
    assert read.icc_profile is None and "profile is broken" in read.notes[0]


def test_animation_gives_its_first_frame_and_a_note(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    read = read_picture(tmp_path / "a.gif")
    assert read.pixels[0, 0].tolist() == [255, 0, 0] and "2 frames" in read.notes[0]


def photo_bytes(format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(samples(40, 40, 3, np.uint8)).save(file, format)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"not an image", "is not an image"),
        (photo_bytes("PNG")[:2000], "broken or unsupported"),
        (photo_bytes("JPEG")[:1000], "broken or unsupported"),
        (photo_bytes("TIFF")[:1000], "broken or unsupported|is not an image"),
        (photo_bytes("WEBP")[:100], "broken or unsupported|is not an image"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "bad.img"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageFileError, match=reason) as error:
        read_picture(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("error", [RuntimeError("Failed to decode frame 0"), SyntaxError("bad"), EOFError()])
def test_whatever_a_decoder_raises_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: object) -> None:
        raise error

    path = tmp_path / "a.png"
    path.write_bytes(photo_bytes())
    monkeypatch.setattr(ImageFile.ImageFile, "load", broken)
    with pytest.raises(ImageFileError, match=r"a\.png: broken or unsupported image: ."):
        read_picture(path)


def test_truncated_sixteen_bit_file(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    write_picture(path, picture(50, 50, 3, np.uint16), "png")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ImageFileError, match="broken or unsupported"):
        read_picture(path)


def test_decompression_bomb_is_refused_before_decoding(tmp_path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    bomb = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageFileError, match="60000 x 60000 is more than the limit of 178,956,970 pixels"):
        read_picture(bomb)
    assert limit == Image.MAX_IMAGE_PIXELS
    small = tmp_path / "small.png"
    small.write_bytes(photo_bytes())
    assert read_picture(small, max_pixels=1600).width == 40
    with pytest.raises(ImageFileError, match="limit of 1,599 pixels"):
        read_picture(small, max_pixels=1599)


def test_folder_is_not_an_image(tmp_path: Path) -> None:
    with pytest.raises(ImageFileError, match="is a folder"):
        read_picture(tmp_path)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageFileError, match="is not a regular file"):
        read_picture(tmp_path / "pipe.png")


def test_writing_leaves_nothing_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "sub" / "out.png"
    write_picture(target, picture(2, 2, 3, np.uint8), "png")
    before = target.read_bytes()
    with pytest.raises(ImageFileError, match="exists already"):
        write_picture(target, picture(2, 2, 3, np.uint8, seed=1), "png")

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PngEncoder, "add_rows", full_disk)
        with pytest.raises(ImageFileError, match=r"out\.png: cannot be written: No space left on device"):
            write_picture(target, picture(2, 2, 3, np.uint8, seed=1), "png", overwrite=True)
    assert target.read_bytes() == before
    assert [p.name for p in target.parent.iterdir()] == ["out.png"]
    write_picture(target, picture(2, 2, 3, np.uint8, seed=1), "png", overwrite=True)
    assert target.read_bytes() != before


def test_rows_that_do_not_fit_leave_no_file(tmp_path: Path) -> None:
    whole = picture(4, 3, 3, np.uint8)
    for rows, reason in (
        (whole.rows(0, 3), "expected 4 in all, found 3"),
        (picture(5, 3, 3, np.uint8), "expected 4 in all, found 5"),
        (picture(4, 3, 4, np.uint8), "expected 3 x 3 uint8 samples, found 3 x 4 uint8"),
        (picture(4, 2, 3, np.uint16), "expected 3 x 3 uint8 samples, found 2 x 3 uint16"),
    ):
        with (
            pytest.raises(ValueError, match=f"^rows: {reason}"),
            picture_writers({1: tmp_path / "a.png"}, whole, "png") as writers,
        ):
            writers[1].add_rows(rows)
        assert list(tmp_path.iterdir()) == []


def test_a_fault_of_who_feeds_the_rows_is_not_taken_for_one_of_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(BrokenPipeError),
        picture_writers({1: tmp_path / "a.png"}, picture(1, 1, 1, np.uint8), "png"),
    ):
        raise BrokenPipeError
    assert list(tmp_path.iterdir()) == []


def test_unwritable_targets_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ImageFileError, match="cannot be written"):
        write_picture(tmp_path / "file" / "out.png", picture(2, 2, 3, np.uint8), "png")
    with pytest.raises(ImageFileError, match="cannot be written"):
        write_picture(tmp_path / "wide.webp", picture(1, 16400, 3, np.uint8), "webp")


def test_jpeg_lays_alpha_over_white(tmp_path: Path) -> None:
    see_through = Picture(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8))
    write_picture(tmp_path / "out.jpg", see_through, "jpg")
    assert read_picture(tmp_path / "out.jpg").pixels.min() > 250
    grey = Picture(np.zeros((8, 8, 1), np.uint8), np.zeros((8, 8), np.uint8))
    write_picture(tmp_path / "grey.jpg", grey, "jpg")
    read = read_picture(tmp_path / "grey.jpg")
    assert read.pixels.shape == (8, 8, 1) and read.pixels.min() > 250


def test_picture_checks_its_arrays() -> None:
    with pytest.raises(TypeError, match="pixels: expected uint8 or uint16, found float64"):
        Picture(np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match=r"pixels: expected shape"):
        Picture(np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"alpha: expected uint8 of shape \(2, 2\)"):
        Picture(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3), np.uint8))
