"""`hitsr-fast upscale` on small files, with a model that repeats pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

from hitsr_fast.cli.upscale import Upscale
from hitsr_fast.imaging.io import read_picture
from hitsr_fast.pipeline import HitSR
from tests.imaging.nearest_model import NearestModel


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HitSR, "from_pretrained", lambda *_: HitSR(NearestModel()))


def upscale(*arguments: object) -> int:
    return tyro.cli(Upscale, args=[str(argument) for argument in arguments]).run()


def photo(path: Path, size: tuple[int, int] = (20, 10), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_one_photo_gives_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert upscale(photo(tmp_path / "cat.png"), "-o", tmp_path / "out") == 0
    assert files(tmp_path / "out") == ["cat_x1.png", "cat_x2.png", "cat_x4.png"]
    with Image.open(tmp_path / "out" / "cat_x4.png") as image:
        assert image.size == (80, 40)
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        *(f"{tmp_path}/out/cat_x{f}.png  {20 * f} x {10 * f}" for f in (1, 2, 4)),
        f"1 upscaled into {tmp_path}/out, 0 failed",
    ]
    assert captured.err == ""


def test_scales_and_format_and_tree(tmp_path: Path) -> None:
    photo(tmp_path / "in/a.png")
    photo(tmp_path / "in/sub/b.jpg", mode="L")
    assert upscale(tmp_path / "in", "-o", tmp_path / "out", "--scales", 1, 2, "--format", "jpg") == 0
    assert files(tmp_path / "out") == ["a_x1.jpg", "a_x2.jpg", "sub/b_x1.jpg", "sub/b_x2.jpg"]


def test_bad_inputs_are_named_and_the_others_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = photo(tmp_path / "good.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo(tmp_path / "whole.png", (60, 60)).read_bytes()[:3000])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    large = photo(tmp_path / "large.png", (40, 40))
    bad = [tmp_path / "missing.png", cut, tmp_path / "text.png", tmp_path / "empty.png", large]
    assert upscale(*bad, good, "-o", tmp_path / "out", "--scales", 1, "--max-pixels", 1000) == 2
    assert files(tmp_path / "out") == ["good_x1.png"]
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == len(bad)
    for line, path in zip(lines, bad, strict=True):
        assert line.startswith(f"error: {path}: ")
    assert captured.out.splitlines()[-1] == f"1 upscaled into {tmp_path}/out, 5 failed"


def test_existing_outputs_are_kept_without_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cat = photo(tmp_path / "cat.png")
    target = tmp_path / "out" / "cat_x2.png"
    target.parent.mkdir()
    target.write_bytes(b"precious")
    assert upscale(cat, "-o", tmp_path / "out") == 2
    assert target.read_bytes() == b"precious" and files(tmp_path / "out") == ["cat_x2.png"]
    assert capsys.readouterr().err == f"error: {cat}: {target} exists already (--overwrite replaces it)\n"
    assert upscale(cat, "-o", tmp_path / "out", "--overwrite") == 0
    assert read_picture(target).width == 40


def test_unwritable_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(tmp_path / "in/a.png")
    photo(tmp_path / "in/sub/b.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").write_text("in the way")
    assert upscale(tmp_path / "in", "-o", tmp_path / "out", "--scales", 1) == 2
    assert files(tmp_path / "out") == ["a_x1.png", "sub"]
    assert "sub/b_x1.png: cannot be written" in capsys.readouterr().err
    assert upscale(tmp_path / "in", "-o", tmp_path / "out" / "sub") == 2
    assert "is a file; the outputs need a folder" in capsys.readouterr().err


def test_equal_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(tmp_path / "in/a.png")
    photo(tmp_path / "in/a.jpg")
    assert upscale(tmp_path / "in", "-o", tmp_path / "out", "--scales", 1) == 2
    assert files(tmp_path / "out") == ["a_x1.png"]
    assert "in/a.png: its outputs would have the same names as those of" in capsys.readouterr().err


def test_options_that_do_not_suit_the_model_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cat = photo(tmp_path / "cat.png")
    assert upscale(cat, "-o", tmp_path / "out", "--tile", 64) == 2
    assert upscale(cat, "-o", tmp_path / "out", "--overlap", 16) == 2
    assert upscale("-o", tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["tile", "overlap", "inputs"]
    assert not (tmp_path / "out").exists()


def test_a_tile_that_stays_nan_fails_its_image_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = HitSR(NearestModel(bad_above=0.5, heals=False))
    monkeypatch.setattr(HitSR, "from_pretrained", lambda *_: broken)
    dark = tmp_path / "dark.png"
    Image.new("RGB", (8, 8)).save(dark)
    assert upscale(photo(tmp_path / "cat.png"), dark, "-o", tmp_path / "out", "--scales", 1) == 2
    assert files(tmp_path / "out") == ["dark_x1.png"]
    assert "cat.png: the model gave NaN" in capsys.readouterr().err


def test_animation_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert upscale(tmp_path / "a.gif", "-o", tmp_path / "out", "--no-colour-fix") == 0
    assert capsys.readouterr().err == f"note: {tmp_path}/a.gif: has 2 frames; only the first is used\n"


def test_sixteen_bit_colour_keeps_its_depth(tmp_path: Path) -> None:
    from hitsr_fast.imaging.io import Picture, write_picture

    pixels = np.random.default_rng(0).integers(0, 65536, (9, 7, 3), dtype=np.uint16)
    write_picture(tmp_path / "deep.tiff", Picture(pixels), "tiff")
    assert upscale(tmp_path / "deep.tiff", "-o", tmp_path / "out", "--no-colour-fix") == 0
    assert np.abs(read_picture(tmp_path / "out" / "deep_x1.png").pixels.astype(int) - pixels).max() <= 1
