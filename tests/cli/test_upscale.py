"""`hitsr-fast upscale` on small files, with a model that repeats pixels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from hitsr_fast.cli import main
from hitsr_fast.cli.upscale import Upscale
from hitsr_fast.imaging.io import Picture, read_picture, write_picture
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


def test_a_target_that_cannot_be_made_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HitSR, "upscale_picture", lambda *_: pytest.fail("work was done"))
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert upscale(photo(tmp_path / "cat.png"), "-o", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/out: cannot be made: File exists\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_fails_its_image_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole = HitSR.upscale_picture

    def limited(self: HitSR, picture: Picture, *rest: Any) -> dict[int, Picture]:
        if picture.width > 100:
            raise error
        return whole(self, picture, *rest)

    monkeypatch.setattr(HitSR, "upscale_picture", limited)
    wide = photo(tmp_path / "wide.png", (101, 4))
    assert upscale(wide, photo(tmp_path / "cat.png"), "-o", tmp_path / "out", "--scales", 1) == 2
    assert files(tmp_path / "out") == ["cat_x1.png"]
    assert capsys.readouterr().err == f"error: {wide}: not enough memory\n"


def test_a_fault_of_the_code_surfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(HitSR, "upscale_picture", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        upscale(photo(tmp_path / "cat.png"), "-o", tmp_path / "out")


def test_odd_names_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("two  spaces.png", ":cat:[bold].png"):
        (tmp_path / name).write_bytes(b"")
        assert upscale(tmp_path / name, "-o", tmp_path / "out") == 2
        assert capsys.readouterr().err == f"error: {tmp_path / name}: the file is empty\n"


def test_names_may_be_as_long_as_they_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits, long = "y" * (255 - len("_x1.png")), "z" * 251
    for name in (fits, long):
        photo(tmp_path / f"{name}.png")
    missing = "m" * 300
    arguments = [tmp_path / f"{fits}.png", tmp_path / f"{long}.png", missing]
    assert upscale(*arguments, "-o", tmp_path / "out", "--scales", 1) == 2
    assert files(tmp_path / "out") == [f"{fits}_x1.png"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["File name too long", "File name too long"]


def test_interruption_is_one_line_and_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    cat = tmp_path / "cat.ppm"
    cat.write_bytes(b"P6 1 1 255 abc")
    with pytest.raises(SystemExit) as stop:
        main(["upscale", str(cat), "-o", str(tmp_path / "out")])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert files(tmp_path / "out") == []


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    code = "import sys; from hitsr_fast.cli import main; main(['info'])"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_name_that_is_no_text_is_printed(tmp_path: Path) -> None:
    """In a process of its own: pytest's streams are not those of a terminal."""
    code = "\n".join(
        [
            "import os",
            "from hitsr_fast import cli, pipeline",
            "from tests.imaging.nearest_model import NearestModel",
            "pipeline.HitSR.from_pretrained = lambda *_: pipeline.HitSR(NearestModel())",
            r"cli.main(['upscale', os.fsdecode(b'\xff.png'), '-o', 'out'])",
        ]
    )
    photo(tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"\xff.png"))
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=True
    )
    assert b"out/\xff_x4.png  80 x 40" in done.stdout


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
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 7, 3), dtype=np.uint16)
    write_picture(tmp_path / "deep.tiff", Picture(pixels), "tiff")
    assert upscale(tmp_path / "deep.tiff", "-o", tmp_path / "out", "--no-colour-fix") == 0
    assert np.abs(read_picture(tmp_path / "out" / "deep_x1.png").pixels.astype(int) - pixels).max() <= 1
