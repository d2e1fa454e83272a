"""The metrics by the names under which an evaluation asks for them."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from hitsr_fast.metrics import folders, lpips_weights, pyiqa
from hitsr_fast.metrics._pairs import inner_pair
from hitsr_fast.metrics.dists import dists, missing_dists
from hitsr_fast.metrics.lpips import MIN_SIDE as LPIPS_SIDE
from hitsr_fast.metrics.lpips import LpipsNet, lpips
from hitsr_fast.metrics.niqe import MIN_SIDE as NIQE_SIDE
from hitsr_fast.metrics.niqe import SOURCE as NIQE_SOURCE
from hitsr_fast.metrics.niqe import niqe
from hitsr_fast.metrics.psnr import psnr_rgb, psnr_y
from hitsr_fast.metrics.ssim import MIN_SIDE as SSIM_SIDE
from hitsr_fast.metrics.ssim import ssim_rgb, ssim_y

MetricKind = Literal["full", "none", "set"]


@dataclass(frozen=True)
class Metric:
    """One metric: what it is called, how it is measured, and what it needs.

    `measure` takes images `(B, 3, H, W)` in [0, 1] and returns a tensor `(B,)` on their device:
    `(result, truth, border)` of the kind "full", `(result, border)` of the kind "none". Of the kind "set" it
    takes two folders of images, `(results, truths)`, and returns a number. Those of images leave out the
    border that they are given.
    """

    name: str
    title: str
    kind: MetricKind
    higher_is_better: bool
    digits: int  # behind the point, in tables
    min_side: int  # of images, beside the border
    measure: Callable[..., Any]
    missing: Callable[[], str | None]  # why it cannot run here, with the command or extra that helps
    bordered: bool = False  # whether by custom a border is left out; else 0 is what papers mean
    package: str = ""  # another distribution that measures

    def version(self) -> str:
        """The package that measures and its version; "" where that is this one.

        Of a package that is on the path without being installed, the name alone.
        """
        try:
            return f"{self.package} {importlib.metadata.version(self.package)}" if self.package else ""
        except importlib.metadata.PackageNotFoundError:
            return self.package


def _nothing() -> None:
    return None


def _lpips(net: LpipsNet, result: Tensor, truth: Tensor, border: int = 0) -> Tensor:
    a, b = inner_pair(result, truth, border=border, min_side=LPIPS_SIDE[net])
    return lpips(a * 2 - 1, b * 2 - 1, net)


def _dists(result: Tensor, truth: Tensor, border: int = 0) -> Tensor:
    return dists(*inner_pair(result, truth, border=border, min_side=1))


def _of_folders(measure: Callable[..., float], results: Path, truths: Path | None) -> float:
    if truths is None:
        raise ValueError("truths: expected a folder of images to compare with, found None")
    # One picture at a time: those of a set need not have one size.
    return measure(results, truths, batch_size=1)


def _of_sets(name: str, title: str, digits: int, measure: Callable[..., float]) -> Metric:
    of_folders = functools.partial(_of_folders, measure)
    return Metric(name, title, "set", False, digits, 1, of_folders, folders.missing, package="torch-fidelity")


def _pair(name: str, title: str, digits: int, min_side: int, measure: Callable[..., Tensor]) -> Metric:
    """One that needs no weights and by custom leaves out a border."""
    return Metric(name, title, "full", True, digits, min_side, measure, _nothing, bordered=True)


def _learned(name: str, title: str, net: LpipsNet) -> Metric:
    measure, missing = functools.partial(_lpips, net), lpips_weights.SOURCE.missing
    return Metric(name, title, "full", False, 4, LPIPS_SIDE[net], measure, missing)


def _by_pyiqa(name: str, title: str, digits: int, min_side: int) -> Metric:
    measure = functools.partial(pyiqa.measure, name, min_side=min_side)
    return Metric(name, title, "none", True, digits, min_side, measure, pyiqa.missing, package="pyiqa")


_ALL = (
    _pair("psnr_y", "PSNR-Y", 2, 1, psnr_y),
    _pair("ssim_y", "SSIM-Y", 4, SSIM_SIDE, ssim_y),
    _pair("psnr_rgb", "PSNR-RGB", 2, 1, psnr_rgb),
    _pair("ssim_rgb", "SSIM-RGB", 4, SSIM_SIDE, ssim_rgb),
    _learned("lpips", "LPIPS", "alex"),
    _learned("lpips_vgg", "LPIPS-VGG", "vgg"),
    Metric("dists", "DISTS", "full", False, 4, 1, _dists, missing_dists),
    Metric("niqe", "NIQE", "none", False, 4, NIQE_SIDE, niqe, NIQE_SOURCE.missing),
    _of_sets("fid", "FID", 2, folders.fid),
    _of_sets("kid", "KID", 5, folders.kid),
    _by_pyiqa("musiq", "MUSIQ", 2, 1),
    _by_pyiqa("maniqa", "MANIQA", 4, 224),
    _by_pyiqa("clipiqa", "CLIP-IQA", 4, 1),
)

METRICS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _ALL})
