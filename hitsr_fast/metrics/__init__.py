"""Image quality metrics, and the resizing that their test sets rest on; `registry` has them by name."""

from hitsr_fast.metrics.dists import DISTS, dists
from hitsr_fast.metrics.folders import fid, kid
from hitsr_fast.metrics.lpips import LPIPS, lpips
from hitsr_fast.metrics.niqe import niqe
from hitsr_fast.metrics.psnr import psnr_rgb, psnr_y
from hitsr_fast.metrics.registry import METRICS, Metric
from hitsr_fast.metrics.resize import imresize
from hitsr_fast.metrics.ssim import ssim_rgb, ssim_y

__all__ = [
    "DISTS",
    "LPIPS",
    "METRICS",
    "Metric",
    "dists",
    "fid",
    "imresize",
    "kid",
    "lpips",
    "niqe",
    "psnr_rgb",
    "psnr_y",
    "ssim_rgb",
    "ssim_y",
]
