"""`hitsr-fast eval-tokenizer`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import tyro
from PIL import Image
from torch.nn import functional

from hitsr_fast.cli.eval_tokenizer import EvalTokenizer
from hitsr_fast.evaluate.frechet import frechet_distance
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


def test_the_packaged_tokenizer(tmp_path: Path) -> None:
    model = HitVar.from_pretrained("hit-tiny")
    side = model.config.tokenizer.image_size
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    smooth = functional.interpolate(coarse, (side, side + 10), mode="bilinear")[0]
    image = Image.fromarray((smooth * 255).round().byte().permute(1, 2, 0).numpy())
    (tmp_path / "HR").mkdir()
    image.save(tmp_path / "HR/a.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "HR/small.png")
    args = ["hit-tiny", "--set", f"s={tmp_path}/HR", "--metrics", "psnr_rgb", "--device", "cpu"]
    assert tyro.cli(EvalTokenizer, args=[*args, "--out", str(tmp_path / "t.json")]).run() == 0
    report = json.loads((tmp_path / "t.json").read_text())
    assert {(m["scale"], m["method"]) for m in report["means"]} == {
        (factor, scheme) for factor in (1, 2, 4) for scheme in ("plain", "Algorithm 1")
    }
    assert any("small" in note for note in report["notes"])
    # The last target of Algorithm 1 against the model's own path.
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(side, side + 10, 3)
    hr = pixels.permute(2, 0, 1)[None, :, :, 5 : 5 + side].float() / 255
    with torch.inference_mode():
        latents = model.tokenizer.tokenize(hr * 2 - 1).reconstructions
        decoded = model.decode(latents, 2, model.tokenizer.pyramid(hr * 2 - 1)[0])
    result = ((decoded * 0.5 + 0.5).clamp(0, 1) * 255).round() / 255
    (found,) = [m for m in report["means"] if (m["scale"], m["method"]) == (4, "Algorithm 1")]
    assert abs(found["psnr_rgb"] - psnr_rgb(result, hr).item()) < 1e-3
