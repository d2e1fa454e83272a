from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hitsr_fast.metrics import METRICS, lpips, psnr_rgb, psnr_y, ssim_rgb, ssim_y
from hitsr_fast.metrics import pyiqa as module
from tests.metrics.lpips_package import FakePackage

NAMES = [
    *("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips", "lpips_vgg", "dists"),
    *("niqe", "fid", "kid", "musiq", "maniqa", "clipiqa"),
]
FAKE = """
made = []
def create_metric(name, device):
    made.append((name, str(device)))
    return lambda image: image.mean(dim=(1, 2, 3))[:, None] + len(name)
"""


def images(height: int = 40, width: int = 44) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, height, width, generator=generator)
    return a, (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)


def test_names_kinds_and_directions() -> None:
    assert list(METRICS) == NAMES
    assert all(metric.name == name for name, metric in METRICS.items())
    assert len({metric.title for metric in METRICS.values()}) == len(NAMES)
    assert {name for name, m in METRICS.items() if m.kind == "set"} == {"fid", "kid"}
    assert {name for name, m in METRICS.items() if m.kind == "none"} == {"niqe", "musiq", "maniqa", "clipiqa"}
    lower = {"lpips", "lpips_vgg", "dists", "niqe", "fid", "kid"}
    assert {name for name, m in METRICS.items() if not m.higher_is_better} == lower
    assert {name for name, m in METRICS.items() if m.bordered} == {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"}
    with pytest.raises(TypeError):
        METRICS["psnr"] = METRICS["psnr_y"]  # type: ignore[index]


def test_full_reference_metrics_are_the_functions(
    package: FakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(package.weights.parent))
    a, b = images()
    expected = {
        "psnr_y": psnr_y(a, b, 3),
        "ssim_y": ssim_y(a, b, 3),
        "psnr_rgb": psnr_rgb(a, b, 3),
        "ssim_rgb": ssim_rgb(a, b, 3),
        "lpips": lpips(a[..., 3:-3, 3:-3] * 2 - 1, b[..., 3:-3, 3:-3] * 2 - 1),
        "lpips_vgg": lpips(a[..., 3:-3, 3:-3] * 2 - 1, b[..., 3:-3, 3:-3] * 2 - 1, net="vgg"),
    }
    for name, value in expected.items():
        assert METRICS[name].missing() is None
        assert torch.equal(METRICS[name].measure(a, b, 3), value)


@pytest.mark.parametrize("name", ["psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips", "lpips_vgg"])
def test_the_smallest_side_is_the_smallest(
    name: str, package: FakePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(package.weights.parent))
    metric = METRICS[name]
    side = metric.min_side + 2 * 4
    a, b = images(side, side)
    assert metric.measure(a, b, 4).isfinite().all()
    with pytest.raises(ValueError, match=f"sides of at least {side} px"):
        metric.measure(a[..., 1:], b[..., 1:], 4)


@pytest.mark.parametrize("name", ["fid", "kid"])
def test_metrics_of_folders_have_no_border(name: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        METRICS[name].measure(tmp_path, tmp_path, 4)


def test_what_is_missing_names_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    reasons = {name: metric.missing() for name, metric in METRICS.items()}
    needs = {
        "lpips": "hitsr-fast weights lpips",
        "lpips_vgg": "hitsr-fast weights lpips",
        "dists": "hitsr-fast weights dists",
        "niqe": "hitsr-fast weights niqe",
        "fid": "pip install 'hitsr-fast[fid]'",
        "kid": "pip install 'hitsr-fast[fid]'",
        **dict.fromkeys(("musiq", "maniqa", "clipiqa"), "PolyForm Noncommercial"),
    }
    assert {name for name, reason in reasons.items() if reason is not None} == set(needs)
    assert all(part in (reasons[name] or "") for name, part in needs.items())
    a, _ = images()
    with pytest.raises(ImportError, match="musiq: pyiqa is not installed: pip install pyiqa"):
        METRICS["musiq"].measure(a)


def test_what_pyiqa_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyiqa.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pyiqa", raising=False)
    module.metric_of.cache_clear()
    a, _ = images(232, 240)
    for name in ("musiq", "maniqa", "clipiqa"):
        assert METRICS[name].missing() is None
        expected = a[..., 4:-4, 4:-4].mean(dim=(1, 2, 3)) + len(name)
        for _ in range(2):
            torch.testing.assert_close(METRICS[name].measure(a, 4), expected)
    made = sys.modules["pyiqa"].made
    assert made == [("musiq", "cpu"), ("maniqa", "cpu"), ("clipiqa", "cpu")]
    with pytest.raises(ValueError, match=r"images: expected sides of at least 232 px, found \(231, 240\)"):
        METRICS["maniqa"].measure(a[..., 1:, :], 4)
    module.metric_of.cache_clear()
    monkeypatch.delitem(sys.modules, "pyiqa")


def test_importing_the_metrics_imports_neither_package() -> None:
    """pyiqa is not free for every use: nothing here may pull it in unasked."""
    import subprocess

    code = (
        "import sys, hitsr_fast.metrics; print([n for n in ('pyiqa', 'torch_fidelity') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
