"""`hitsr-fast upscale` on small files, with a model that repeats pixels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from hitsr_fast.backends import NAMES
from hitsr_fast.cli import main
from hitsr_fast.cli.upscale import Upscale
from hitsr_fast.imaging.io import Picture, read_picture
from hitsr_fast.imaging.writing import PictureWriter, PngEncoder, write_picture
from hitsr_fast.nn.sampling import SamplingOptions
from hitsr_fast.ops import instruction_sets
from hitsr_fast.pipeline import HitSR, PictureRows, UpscaleOptions
from tests.imaging.nearest_model import NearestModel
from tests.ops.backends import require


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


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_the_model_that_ships_runs_in_each_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    monkeypatch.undo()  # no stand-in for the model
    cat = photo(tmp_path / "cat.png")
    assert upscale(cat, "-o", tmp_path / "out", "--device", "cpu", "--dtype", dtype) == 0
    with Image.open(tmp_path / "out" / "cat_x4.png") as image:
        assert image.size == (80, 40)
    assert capsys.readouterr().err == ""


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
    monkeypatch.setattr(HitSR, "stream_picture", lambda *_: pytest.fail("work was done"))
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
    whole = HitSR.stream_picture

    def limited(self: HitSR, picture: Picture, *rest: Any) -> Iterator[PictureRows]:
        if picture.width > 100:
            raise error
        return whole(self, picture, *rest)

    monkeypatch.setattr(HitSR, "stream_picture", limited)
    wide = photo(tmp_path / "wide.png", (101, 4))
    assert upscale(wide, photo(tmp_path / "cat.png"), "-o", tmp_path / "out", "--scales", 1) == 2
    assert files(tmp_path / "out") == ["cat_x1.png"]
    assert capsys.readouterr().err == f"error: {wide}: not enough memory\n"


def test_a_fault_of_the_code_surfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(HitSR, "stream_picture", broken)
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
    whole, written = PictureWriter.add_rows, []

    def interrupted(self: PictureWriter, rows: Picture) -> None:
        written.append(files(tmp_path / "out"))
        if len(written) == 5:
            raise KeyboardInterrupt
        whole(self, rows)

    monkeypatch.setattr(PictureWriter, "add_rows", interrupted)
    cat = photo(tmp_path / "cat.png", (20, 60))
    with pytest.raises(SystemExit) as stop:
        main(["upscale", str(cat), "-o", str(tmp_path / "out")])
    assert stop.value.code == 130
    assert all(len(names) == 3 and names[0].startswith(".hitsr-fast-") for names in written)
    assert capsys.readouterr().err == "interrupted\n"
    assert files(tmp_path / "out") == []


@pytest.mark.parametrize("format", ["png", "tiff"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_files_equal_what_python_gives(tmp_path: Path, mode: str, format: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 4), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("RGB" if mode == "P" else "L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256 + pixels[..., 1])
    image.convert("P" if mode == "P" else image.mode).save(tmp_path / "a.png")
    assert upscale(tmp_path / "a.png", "-o", tmp_path / "out", "--format", format) == 0
    with Image.open(tmp_path / "a.png") as source:
        expected = HitSR(NearestModel()).upscale(source)
    for factor, whole in ((1, expected.x1), (2, expected.x2), (4, expected.x4)):
        assert whole is not None
        with Image.open(tmp_path / "out" / f"a_x{factor}.{format}") as image:
            assert image.mode == whole.mode
            assert np.array_equal(np.asarray(image), np.asarray(whole))


@pytest.mark.parametrize("format", ["png", "tiff"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_files_of_sixteen_bits_equal_what_python_gives(tmp_path: Path, channels: int, format: str) -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (50, 40, channels), dtype=np.uint16)
    deep = Picture(samples) if channels % 2 else Picture(samples[..., :-1], samples[..., -1])
    write_picture(tmp_path / "a.png", deep, "png")
    assert upscale(tmp_path / "a.png", "-o", tmp_path / "out", "--format", format) == 0
    for factor, whole in HitSR(NearestModel()).upscale_picture(deep, UpscaleOptions()).items():
        expected = whole.samples
        if format == "tiff" and channels == 2:
            expected = expected[..., [0, 0, 0, 1]]
        read = read_picture(tmp_path / "out" / f"a_x{factor}.{format}").samples
        assert read.dtype == np.uint16 and np.array_equal(read, expected)


def test_what_fails_at_its_end_leaves_the_earlier_outputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.zeros((60, 20, 3), np.uint8)
    pixels[59] = 255
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    assert upscale(tmp_path / "cat.png", "-o", tmp_path / "out") == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    monkeypatch.setattr(HitSR, "from_pretrained", lambda *_: HitSR(NearestModel(bad_above=0.5, heals=False)))
    assert upscale(tmp_path / "cat.png", "-o", tmp_path / "out", "--overwrite", "--batch", 1) == 2
    assert "for the tile at input pixel x=0, y=44" in capsys.readouterr().err
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")} == before


def test_a_disk_that_fills_up_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = PngEncoder.add_rows

    def full(self: PngEncoder, rows: Picture) -> None:
        if rows.width == 40:
            raise OSError(28, "No space left on device")
        whole(self, rows)

    monkeypatch.setattr(PngEncoder, "add_rows", full)
    assert upscale(photo(tmp_path / "cat.png"), "-o", tmp_path / "out") == 2
    assert files(tmp_path / "out") == []
    message = f"error: {tmp_path}/out/cat_x2.png: cannot be written: No space left on device\n"
    assert capsys.readouterr().err == message


MEMORY = """
import sys
from pathlib import Path
import numpy as np
import torch
from benchmarks._machine import peak_extra_bytes
from hitsr_fast import pipeline
from hitsr_fast.cli import upscale
from hitsr_fast.imaging.io import Picture
from tests.imaging.nearest_model import NearestModel
pipeline.HitSR.from_pretrained = lambda *_: pipeline.HitSR(NearestModel())
upscale.read_picture = lambda path, **_: Picture(np.full((int(path.stem), 64, 3), 99, np.uint8))
def run(height):
    arguments = upscale.Upscale((f"{height}.png",), Path(sys.argv[1]), format=sys.argv[2], overwrite=True)
    assert arguments.run() == 0
run(2048)
print(*(peak_extra_bytes(lambda: run(height), torch.device("cpu")) for height in (2048, 8192)))
"""


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_memory_is_that_of_the_input_and_a_band(tmp_path: Path, format: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path, format],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    low, tall = map(int, done.stdout.splitlines()[-1].split())
    assert low > 0
    # The outputs of the taller image have 24 MB more; the input 1.2 MB, and 8 MB the allocator may keep.
    assert tall - low < (8192 - 2048) * 64 * 3 + 8 * 2**20, done.stdout


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
    assert upscale(cat, "-o", tmp_path / "out", "--scales", 3) == 2
    assert upscale(cat, "-o", tmp_path / "out", "--guided-scales", 9, 10) == 2
    assert upscale(cat, "-o", tmp_path / "out", "--top-p", -1) == 2
    assert upscale(cat, "-o", tmp_path / "out", "--overlap", 16) == 2
    assert upscale("-o", tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        *("scales", "guided_scales", "top_p", "overlap", "inputs")
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["HITSR_FAST_BACKEND", "HITSR_FAST_CPU_ISA"])
def test_a_setting_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "HITSR_FAST_CPU_ISA":
        require("cpu")
    known = NAMES if name == "HITSR_FAST_BACKEND" else instruction_sets()
    monkeypatch.setenv(name, "abacus")
    assert upscale(photo(tmp_path / "cat.png"), "-o", tmp_path / "out") == 2
    message = f"error: {name}: expected one of {', '.join(known)}, found 'abacus'\n"
    assert capsys.readouterr().err == message


def test_a_class_and_a_kind_of_input_together_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cat = photo(tmp_path / "cat.png")
    assert upscale(cat, "-o", tmp_path / "out", "--class-id", 0, "--input", "clean") == 2
    assert capsys.readouterr().err == "error: class_id: expected no --input beside it, found 'clean'\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told", "warning"),
    [
        ([], {"input": "clean", "sampling": SamplingOptions(seed=0)}, ""),
        (["--input", "photo"], {"input": "photo"}, ""),
        (["--input", "unknown"], {"input": "unknown"}, ""),
        (["--class-id", 0], {"input": "photo"}, "warning: --class-id is deprecated: use --input photo\n"),
        (["--class-id", 1], {"input": "clean"}, "warning: --class-id is deprecated: use --input clean\n"),
        (
            ["--guidance", 1.5, "--guided-scales", 3, 4, 5, "--top-k", 0, "--temperature", 2, "--seed", 7],
            {"sampling": SamplingOptions(1.5, (3, 4, 5), 0, temperature=2.0, seed=7)},
            "",
        ),
    ],
)
def test_what_the_model_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[object],
    told: dict[str, object],
    warning: str,
) -> None:
    calls: list[dict[str, object]] = []

    class Model(NearestModel):
        def super_resolve(self, lr: torch.Tensor, sampling: SamplingOptions, **options: Any) -> Any:
            calls.append({"sampling": sampling, **options})
            return super().super_resolve(lr, sampling, **options)

    monkeypatch.setattr(HitSR, "from_pretrained", lambda *_: HitSR(Model()))
    assert upscale(photo(tmp_path / "cat.png"), "-o", tmp_path / "out", *options) == 0
    assert calls and all(told.items() <= call.items() for call in calls)
    assert capsys.readouterr().err == warning


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


def test_forced_backend_that_cannot_run_is_said_once(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(photo)
    result = subprocess.run(
        [sys.executable, "-c", "from hitsr_fast.cli import main; main()", "upscale", str(photo), "-o", "out"],
        cwd=tmp_path,
        env={**os.environ, "HITSR_FAST_BACKEND": "triton"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert "forced backend 'triton' cannot run" in result.stderr and "Traceback" not in result.stderr
    assert not list((tmp_path / "out").glob("*"))
