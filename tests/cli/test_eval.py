from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from hitsr_fast.backends import NAMES
from hitsr_fast.cli.eval import Eval
from hitsr_fast.data.degradation import degrade
from hitsr_fast.evaluate import Bicubic, EvalSet, EvaluationError, evaluate, find_set
from hitsr_fast.metrics import imresize, lpips, psnr_y, ssim_y
from hitsr_fast.ops import instruction_sets
from hitsr_fast.pipeline import HitSR, ModelNotFoundError
from tests.imaging.nearest_model import NearestModel
from tests.ops.backends import require
from tests.tolerances import TOLERANCES


@pytest.fixture(autouse=True)
def lpips_weights(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """AlexNet's structure with random weights, in a cache of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HITSR_FAST_CACHE", str(folder))
    shapes = [(64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3)]
    tensors = {}
    for stage, (outputs, inputs, side) in enumerate(shapes):
        scale = (2 / (inputs * side * side)) ** 0.5
        tensors[f"alex.convs.{stage}.0.weight"] = scale * torch.randn(outputs, inputs, side, side)
        tensors[f"alex.convs.{stage}.0.bias"] = torch.zeros(outputs)
        tensors[f"alex.heads.{stage}"] = torch.rand(outputs)
    save_file(tensors, folder / "lpips.safetensors")
    return folder


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, device: torch.device, dtype: torch.dtype | None) -> HitSR:
        if name != "hit-tiny":
            raise ModelNotFoundError(f"model: no {name!r}")
        return HitSR(NearestModel(), device)

    monkeypatch.setattr(HitSR, "from_pretrained", load)


def photo(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth random colours, uint8 (height, width, 3)."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return (smooth * 255).round().byte().permute(1, 2, 0).numpy()


def to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def write_pairs(hr: Path, lr: Path, hr_name: str, lr_name: str, count: int = 2) -> None:
    hr.mkdir(parents=True, exist_ok=True)
    lr.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = photo(i, 132, 128 + 4 * i)
        small = Image.fromarray(pixels).resize((32 + i, 33), Image.Resampling.BICUBIC)
        Image.fromarray(pixels).save(hr / hr_name.format(i))
        small.save(lr / lr_name.format(i))


def run(*args: str | Path) -> int:
    return tyro.cli(Eval, args=[str(arg) for arg in args]).run()


def test_table_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "a/HR", tmp_path / "a/LR", "{:04d}.png", "{:04d}x4.png")
    write_pairs(
        tmp_path / "b/image_SRF_4", tmp_path / "b/image_SRF_4", "i{}_SRF_4_HR.png", "i{}_SRF_4_LR.png", 1
    )
    out = [tmp_path / "out" / f"table.{suffix}" for suffix in ("json", "csv", "md")]
    pairs, both = f"pairs={tmp_path}/a/HR:{tmp_path}/a/LR", f"both={tmp_path}/b"
    assert run("--set", pairs, "--set", both, "--out", *out, "--device", "cpu") == 0

    report = json.loads(out[0].read_text())
    keys = [(mean["set"], mean["scale"], mean["method"], mean["images"]) for mean in report["means"]]
    assert keys == [
        (name, scale, method, images)
        for name, images in (("pairs", 2), ("both", 1))
        for scale in (1, 2, 4)
        for method in ("bicubic", "hit-tiny")
    ]
    assert len(report["images"]) == 3 * 3 * 2
    assert (report["settings"]["seed"], report["settings"]["input"]) == (0, "clean")
    assert report["notes"] == []

    with out[1].open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lpips"]) for row in rows] == [mean["lpips"] for mean in report["means"]]
    lines = out[2].read_text().splitlines()
    assert lines[0] == "| set | scale | method | images | PSNR-Y | SSIM-Y | LPIPS |"
    assert len(lines) == 2 + len(keys)
    assert f"| pairs | x4 | bicubic | 2 | {report['means'][4]['psnr_y']:.2f} |" in lines[6]
    assert not list(out[0].parent.glob(".*"))

    printed = capsys.readouterr().out
    assert f"{report['means'][5]['lpips']:.4f}" in printed
    assert "hit-tiny" in printed


def test_scores_are_those_of_the_metrics(tmp_path: Path) -> None:
    write_pairs(tmp_path / "HR", tmp_path / "LR", "{}.png", "{}.png", 1)
    report = evaluate([find_set("set", tmp_path / "HR", tmp_path / "LR")], [Bicubic()])
    hr = photo(0, 132, 128)
    lr = Image.open(tmp_path / "LR/0.png")
    for score in report.scores:
        size = (32 * score.scale, 33 * score.scale)
        result = to_tensor(np.array(lr.resize(size, Image.Resampling.BICUBIC)))
        truth = imresize(to_tensor(hr), score.scale / 4) if score.scale < 4 else to_tensor(hr)
        truth = (truth.clamp(0, 1) * 255).round() / 255
        assert score.values["psnr_y"] == psnr_y(result, truth, border=score.scale).item()
        assert score.values["ssim_y"] == ssim_y(result, truth, border=score.scale).item()
        expected = lpips(result * 2 - 1, truth * 2 - 1).item()
        # Another memory layout of the same image lets the convolutions add in another order.
        tolerance = TOLERANCES["float32_reordered"]
        assert score.values["lpips"] == pytest.approx(expected, rel=tolerance.rtol, abs=tolerance.atol)
    assert (
        report.scores[0].values["psnr_y"]
        > report.scores[1].values["psnr_y"]
        > report.scores[2].values["psnr_y"]
    )


def test_sixteen_bits_and_grey_are_read_as_the_same_in_eight_bit_colour(tmp_path: Path) -> None:
    grey = photo(0, 40, 40)[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a_HR.png")
    Image.fromarray(grey[:10, :10]).save(tmp_path / "a_LR.png")
    hr, lr = find_set("set", tmp_path).load(0)[:2]
    assert torch.equal(hr, to_tensor(grey[..., None].repeat(3, 2)))
    assert torch.equal(lr, hr[..., :10, :10])


def test_degraded_set(tmp_path: Path) -> None:
    folder = tmp_path / "HR"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(photo(i, 131, 133)).save(folder / f"{i}.png")
    arguments = ("--hr", folder, "--degrade", "--model", "--scales", "4", "--out", tmp_path / "a.json")
    tables = []
    for seed in (3, 3, 4):
        assert run(*arguments, "--seed", str(seed)) == 0
        tables.append(json.loads((tmp_path / "a.json").read_text()))
    assert tables[0] == tables[1]
    assert tables[0]["images"] != tables[2]["images"]
    assert run(*arguments, "--seed", "3", "--limit", "1") == 0
    assert json.loads((tmp_path / "a.json").read_text())["images"] == tables[0]["images"][:1]

    hr, lr = find_set("HR", folder, degrade_seed=3).load(1)[:2]
    assert hr.shape == (1, 3, 128, 132)
    assert torch.equal(hr, to_tensor(photo(1, 131, 133))[..., :128, :132])
    assert torch.equal(lr, degrade(hr, 3, first_index=1))


def test_small_images_are_left_out_with_a_reason(tmp_path: Path) -> None:
    """32 pixels at x4 leave 8 at x1, too few for SSIM and LPIPS, and 16 at x2, too few for LPIPS."""
    hr = tmp_path / "HR"
    hr.mkdir()
    Image.fromarray(photo(0, 32, 32)).save(hr / "tiny.png")
    assert run("--hr", hr, "--degrade", "--model", "--out", tmp_path / "a.json", tmp_path / "a.md") == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert [mean["ssim_y"] is None for mean in report["means"]] == [True, False, False]
    assert [mean["lpips"] is None for mean in report["means"]] == [True, True, False]
    assert all(isinstance(mean["psnr_y"], float) for mean in report["means"])
    assert report["notes"][0] == "HR x1: SSIM-Y needs sides of 13 px, left out: all"
    assert "HR x2: LPIPS needs sides of 31 px, left out: all" in report["notes"]
    assert "| - | - |" in (tmp_path / "a.md").read_text()


def test_equal_images_are_strict_json(tmp_path: Path) -> None:
    for name in ("HR", "LR"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (128, 128), (90, 120, 30)).save(tmp_path / "HR/flat.png")
    Image.new("RGB", (32, 32), (90, 120, 30)).save(tmp_path / "LR/flat.png")
    report = evaluate([find_set("flat", tmp_path / "HR", tmp_path / "LR")], [Bicubic()])
    assert {score.values["psnr_y"] for score in report.scores} == {math.inf}
    report.save(tmp_path / "a.json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert read["means"][0]["psnr_y"] == "inf"


class Broken:
    """A method whose results are wrong in a chosen way."""

    def __init__(self, results: dict[int, Tensor]) -> None:
        self.name = "broken"
        self._results = results

    def upscale(self, lr: Tensor, scales: Sequence[int]) -> dict[int, Tensor]:
        return self._results


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({}, "broken on set/0 x4: no result"),
        ({4: torch.zeros(1, 3, 132, 127)}, r"expected shape \(1, 3, 132, 128\), found \(1, 3, 132, 127\)"),
        ({4: torch.full((1, 3, 132, 128), math.nan)}, "not finite"),
    ],
)
def test_broken_methods_are_named(tmp_path: Path, results: dict[int, Tensor], message: str) -> None:
    write_pairs(tmp_path / "HR", tmp_path / "LR", "{}.png", "{}.png", 1)
    with pytest.raises(EvaluationError, match=message):
        evaluate([find_set("set", tmp_path / "HR", tmp_path / "LR")], [Broken(results)], scales=[4])


def test_bad_requests() -> None:
    with pytest.raises(EvaluationError, match=r"scales: expected some of \(1, 2, 4\), found \(3,\)"):
        evaluate([], [Bicubic()], scales=[3])
    with pytest.raises(EvaluationError, match="methods: expected different names"):
        evaluate([], [Bicubic(), Bicubic()])
    with pytest.raises(EvaluationError, match="sets: expected different names"):
        evaluate([EvalSet("a", ()), EvalSet("a", ())], [Bicubic()])


def fails(capsys: pytest.CaptureFixture[str], *args: str | Path) -> str:
    """Run a command that must end with exit code 2 and one line on stderr; return that line."""
    assert run(*args) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("hitsr-fast eval: "), captured.err
    assert captured.err.count("\n") == 1
    return captured.err


def test_clear_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hr, lr = tmp_path / "HR", tmp_path / "LR"
    write_pairs(hr, lr, "{}.png", "{}.png")
    assert "nothing to evaluate" in fails(capsys)
    assert "--lr needs --hr" in fails(capsys, "--lr", lr)
    assert "none: no such folder" in fails(capsys, "--hr", tmp_path / "none", "--lr", lr)
    assert "HR: no LR images" in fails(capsys, "--hr", hr)
    assert "not both" in fails(capsys, "--hr", hr, "--lr", lr, "--degrade")
    assert "--set: expected NAME=" in fails(capsys, "--set", str(hr))
    assert "table.txt: expected a name" in fails(
        capsys, "--hr", hr, "--lr", lr, "--out", tmp_path / "table.txt"
    )
    assert "--limit: expected at least 1" in fails(capsys, "--hr", hr, "--lr", lr, "--limit", "0")
    assert "--seed: expected at least 0" in fails(capsys, "--hr", hr, "--degrade", "--seed", "-1")
    assert "model: no 'other'" in fails(capsys, "--hr", hr, "--lr", lr, "--model", "other")

    Image.new("RGB", (30, 33)).save(lr / "1.png")
    assert "1.png: expected 1/4 of" in fails(capsys, "--hr", hr, "--lr", lr)
    (lr / "1.png").write_bytes((hr / "1.png").read_bytes()[:100])
    assert "LR/1.png: broken or unsupported image" in fails(capsys, "--hr", hr, "--lr", lr)
    for name in ("0", "1"):
        (lr / f"{name}.png").rename(lr / f"{name}7.png")
    error = fails(capsys, "--hr", hr, "--lr", lr)
    assert "without a partner" in error
    assert "HR/1.png" in error
    assert "LR/17.png" in error
    (hr / "0.jpg").write_bytes((hr / "0.png").read_bytes())
    assert "has the same name as" in fails(capsys, "--hr", hr, "--lr", lr)


def test_missing_lpips_weights_name_the_command(
    tmp_path: Path, lpips_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / "HR", tmp_path / "LR", "{}.png", "{}.png", 1)
    (lpips_weights / "lpips.safetensors").unlink()
    assert "hitsr-fast weights lpips" in fails(capsys, "--hr", tmp_path / "HR", "--lr", tmp_path / "LR")


def test_damaged_weights_are_one_line(
    tmp_path: Path, lpips_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / "HR", tmp_path / "LR", "{}.png", "{}.png", 1)
    (lpips_weights / "lpips.safetensors").write_bytes(b"garbage" * 9)
    error = fails(capsys, "--hr", tmp_path / "HR", "--lr", tmp_path / "LR")
    assert "lpips.safetensors is damaged" in error and "hitsr-fast weights lpips --force" in error


def test_what_is_wrong_is_said_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str, device: torch.device, dtype: torch.dtype | None) -> HitSR:
        raise AssertionError("loaded")

    monkeypatch.setattr(HitSR, "from_pretrained", load)
    hr, lr = tmp_path / "HR", tmp_path / "LR"
    write_pairs(hr, lr, "{}.png", "{}.png", 1)
    both = ("--hr", hr, "--lr", lr)
    assert "sets: expected different names" in fails(capsys, *both, "--set", f"HR={hr}:{lr}")
    assert "methods: expected different names" in fails(capsys, *both, "--pictures", f"hit-tiny={hr}")
    assert "scales: expected some of (1, 2, 4), found (3,)" in fails(capsys, *both, "--scales", "3")
    assert "none: no such folder" in fails(capsys, *both, "--pictures", f"peer={tmp_path}/none")
    for name in ("HR", "input"):
        arguments = ("--pictures", f"{name}={hr}", "--sheet", tmp_path / "s.png")
        assert f"methods: expected other names than {name}" in fails(capsys, *both, *arguments)
    error = fails(capsys, *both, "--pictures", f"hr={hr}", "--save", tmp_path / "saved")
    assert "methods: expected other names than hr" in error


@pytest.mark.parametrize("name", ["HITSR_FAST_BACKEND", "HITSR_FAST_CPU_ISA"])
def test_a_setting_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_pairs(tmp_path / "HR", tmp_path / "LR", "{}.png", "{}.png", count=1)
    if name == "HITSR_FAST_CPU_ISA":
        require("cpu")
    known = NAMES if name == "HITSR_FAST_BACKEND" else instruction_sets()
    monkeypatch.setenv(name, "abacus")
    assert run("--hr", tmp_path / "HR", "--lr", tmp_path / "LR") == 2
    message = f"hitsr-fast eval: {name}: expected one of {', '.join(known)}, found 'abacus'\n"
    assert capsys.readouterr().err == message
