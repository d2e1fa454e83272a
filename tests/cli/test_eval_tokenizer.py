"""`hitsr-fast eval-tokenizer`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import tyro
from PIL import Image
from torch.nn import functional

from hitsr_fast.cli.eval_tokenizer import EvalTokenizer
from hitsr_fast.evaluate import EvaluationError, columns_of, find_set
from hitsr_fast.evaluate.frechet import frechet_distance
from hitsr_fast.evaluate.tokenizer import evaluate_tokenizer
from hitsr_fast.metrics import psnr_rgb
from hitsr_fast.models import HitVar


def test_frechet_distance_is_that_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    b = a @ torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)) + 1
    covariances = [torch.cov(x.T) for x in (a, b)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    trace = torch.linalg.eigvalsh(root @ covariances[1] @ root).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    expected = means + covariances[0].trace() + covariances[1].trace() - 2 * trace
    assert abs(frechet_distance(a, b) - expected.item()) < 1e-9
    assert abs(frechet_distance(a, a)) < 1e-9


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that must end with exit code 2 and one line on stderr; return that line."""
    assert tyro.cli(EvalTokenizer, args=["hit-tiny", *args]).run() == 2
    error = capsys.readouterr().err
    assert error.startswith("hitsr-fast eval-tokenizer: ") and error.count("\n") == 1
    return error


def test_clear_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    one = f"s={tmp_path}"

    def load(name: str, device: torch.device) -> HitVar:
        raise AssertionError("loaded")

    with monkeypatch.context() as patch:
        patch.setattr(HitVar, "from_pretrained", load)
        assert "metrics: expected those of images, or fd_vgg, found none" in fails(
            capsys, "--set", one, "--metrics"
        )
        error = fails(capsys, "--set", one, "--metrics", "fid")
        assert "metrics: expected those of images, or fd_vgg, found fid" in error
        assert "sets: expected different names" in fails(
            capsys, "--set", one, "--set", one, "--metrics", "psnr_y"
        )
        assert "--limit: expected at least 1" in fails(capsys, "--set", one, "--limit", "0")


def test_a_set_of_small_images_is_said_before_the_others_are_scored(tmp_path: Path) -> None:
    model = HitVar.from_pretrained("hit-tiny")
    side = model.config.tokenizer.image_size
    for name, size in (("large", side), ("little", 20)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (size, size)).save(tmp_path / name / "a.png")
    sets = [find_set(name, tmp_path / name, degrade_seed=0) for name in ("large", "little")]
    scored: list[str] = []
    with pytest.raises(EvaluationError, match=f"little: no image has sides of {side} px"):
        evaluate_tokenizer(model, sets, columns_of(["psnr_y"]), fd_vgg=False, progress=scored.append)
    assert not scored


def test_the_packaged_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = HitVar.from_pretrained("hit-tiny")
    side = model.config.tokenizer.image_size
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = functional.interpolate(coarse, (side, side + 10), mode="bilinear")[0]
    image = Image.fromarray((smooth * 255).round().byte().permute(1, 2, 0).numpy())
    (tmp_path / "HR").mkdir()
    image.save(tmp_path / "HR/a.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "HR/small.png")
    args = ["hit-tiny", "--set", f"{'a' * 60}={tmp_path}/HR", "--metrics", "psnr_rgb", "--device", "cpu"]
    assert tyro.cli(EvalTokenizer, args=[*args, "--out", str(tmp_path / "t.json")]).run() == 0
    report = json.loads((tmp_path / "t.json").read_text())
    assert {(m["scale"], m["method"]) for m in report["means"]} == {
        (factor, scheme) for factor in (1, 2, 4) for scheme in ("plain", "Algorithm 1")
    }
    assert any("small" in note for note in report["notes"])
    settings = report["settings"]
    assert (settings["model"], settings["border"], settings["metrics"]) == ("hit-tiny", 0, ["psnr_rgb"])
    assert settings["torch"] == torch.__version__
    scales = model.config.tokenizer.scales
    (whole,) = [
        u for u in report["usage"] if (u["factor"], u["scheme"], u["side"]) == (4, "plain", scales[-1])
    ]
    assert whole["tokens"] == scales[-1] ** 2 and whole["usage"] == whole["used"] / whole["codes"]
    assert 1 - 1e-9 <= whole["perplexity"] <= whole["used"] * (1 + 1e-9)
    rows = len(report["means"]) + len(report["usage"])
    assert capsys.readouterr().out.count(f"{'a' * 60} ") == rows  # however narrow the terminal
    # The last target of Algorithm 1 against the model's own path.
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side + 10, 3)
    hr = pixels.permute(2, 0, 1)[None, :, :, 5 : 5 + side].float() / 255
    with torch.inference_mode():
        latents = model.tokenizer.tokenize(hr * 2 - 1).reconstructions
        decoded = model.decode(latents, 2, model.tokenizer.pyramid(hr * 2 - 1)[0])
    result = ((decoded.float() * 0.5 + 0.5).clamp(0, 1) * 255).round() / 255
    (found,) = [m for m in report["means"] if (m["scale"], m["method"]) == (4, "Algorithm 1")]
    assert abs(found["psnr_rgb"] - psnr_rgb(result, hr).item()) < 1e-3
