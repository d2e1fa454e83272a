"""Image quality metrics: PSNR-Y, SSIM-Y and LPIPS."""

from hitsr_fast.metrics.lpips import LPIPS, lpips

__all__ = ["LPIPS", "lpips"]
