"""docs/metrics.md against the package."""

from __future__ import annotations

import re
from pathlib import Path

from hitsr_fast.metrics import METRICS
from hitsr_fast.metrics.lpips import MIN_SIDE
from hitsr_fast.metrics.sources import SOURCES

PAGE = (Path(__file__).resolve().parents[2] / "docs/metrics.md").read_text()
FIRST_TABLE = PAGE.split("These are the names")[0]


def test_the_names_are_those_of_the_registry() -> None:
    rows = [line.split("|") for line in FIRST_TABLE.splitlines() if line.startswith("| `")]
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row[1])] == [
        *("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips", "lpips_vgg", "dists"),
        *("niqe", "fid", "kid", "musiq", "maniqa", "clipiqa"),
    ]
    kinds = {"a picture and its truth": "full", "a picture": "none", "two folders": "set"}
    for row in rows:
        for name in re.findall(r"`(\w+)`", row[1]):
            assert METRICS[name].kind == kinds[row[3].strip()]


def test_the_smallest_sides() -> None:
    assert f"Sides of {MIN_SIDE['alex']} px (AlexNet) or {MIN_SIDE['vgg']} px (VGG16)" in PAGE
    assert f"in `METRICS` sides of {METRICS['niqe'].min_side} px" in PAGE
    assert f"Sides of {METRICS['ssim_rgb'].min_side} px within the border" in PAGE
    assert METRICS["dists"].min_side == 1  # "Any size."


def test_the_packages_are_those_that_are_fetched() -> None:
    for name, source in SOURCES.items():
        package, version = source.requirement.split("==")
        assert f"| `{name}` | `{package}` {version}," in PAGE
