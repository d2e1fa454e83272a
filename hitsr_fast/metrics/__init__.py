"""Image quality metrics: PSNR-Y, SSIM-Y and LPIPS, and the resizing that their test sets rest on."""

from hitsr_fast.metrics.lpips import LPIPS, lpips
from hitsr_fast.metrics.psnr import psnr_y
from hitsr_fast.metrics.resize import imresize
from hitsr_fast.metrics.ssim import ssim_y

__all__ = ["LPIPS", "imresize", "lpips", "psnr_y", "ssim_y"]
