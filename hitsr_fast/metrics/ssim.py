"""SSIM on the luma channel and on RGB."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hitsr_fast.metrics._pairs import inner_pair, luma, rgb

_WINDOW, _SIGMA = 11, 1.5
MIN_SIDE = _WINDOW  # beside the border
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def _blur(images: Tensor) -> Tensor:
    """Gaussian window over each channel of `(N, C, H, W)`, without padding."""
    x = torch.arange(_WINDOW, dtype=images.dtype, device=images.device) - _WINDOW // 2
    taps = torch.exp(-x.square() / (2 * _SIGMA**2))
    taps = taps / taps.sum()
    planes = images.flatten(0, 1)[:, None]
    rows = functional.conv2d(planes, taps.view(1, 1, -1, 1))
    blurred = functional.conv2d(rows, taps.view(1, 1, 1, -1))
    return blurred.view(*images.shape[:2], *blurred.shape[2:])


def ssim_y(a: Tensor, b: Tensor, border: int = 4) -> Tensor:
    """Structural similarity on luma; higher is closer.

    Arguments and errors are those of `psnr_y`, but that at least 11 px must be left within the border.

    Returns:
        float64 `(B,)`; 1 for equal images.

    Notes:
        Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004,
        equation 13: Gaussian 11x11 window with sigma 1.5, only where it fits, K1 = 0.01, K2 = 0.03, L = 255.
    """
    a, b = inner_pair(a, b, border=border, min_side=MIN_SIDE)
    return _ssim(luma(a), luma(b))


def ssim_rgb(a: Tensor, b: Tensor, border: int = 0) -> Tensor:
    """Structural similarity on RGB; higher is closer.

    Arguments, result and errors are those of `ssim_y`.

    Notes:
        The mean of the SSIM of the three channels, each as `ssim_y` has it, on values in [0, 255].
    """
    a, b = inner_pair(a, b, border=border, min_side=MIN_SIDE)
    return _ssim(rgb(a), rgb(b))


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    """Of images in [0, 255], the mean over channels and places of the window."""
    stacked = torch.cat([a, b, a * a, b * b, a * b])
    mean_a, mean_b, square_a, square_b, product = _blur(stacked).chunk(5)
    variance_a, variance_b = square_a - mean_a.square(), square_b - mean_b.square()
    covariance = product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a.square() + mean_b.square() + _C1)
    structure = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3))
