"""SSIM on the luma channel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hitsr_fast.metrics._luma import cropped_luma

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def _blur(images: Tensor) -> Tensor:
    """Gaussian window over `(N, 1, H, W)`, without padding."""
    x = torch.arange(_WINDOW, dtype=images.dtype, device=images.device) - _WINDOW // 2
    taps = torch.exp(-x.square() / (2 * _SIGMA**2))
    taps = taps / taps.sum()
    rows = functional.conv2d(images, taps.view(1, 1, -1, 1))
    return functional.conv2d(rows, taps.view(1, 1, 1, -1))


def ssim_y(a: Tensor, b: Tensor, border: int = 4) -> Tensor:
    """Structural similarity on luma; higher is closer.

    Arguments and errors are those of `psnr_y`, but that at least 11 px must be left within the border.

    Returns:
        float64 `(B,)`; 1 for equal images.

    Notes:
        Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004,
        equation 13: Gaussian 11x11 window with sigma 1.5, only where it fits, K1 = 0.01, K2 = 0.03, L = 255.
    """
    y_a, y_b = cropped_luma(a, b, border=border, min_side=_WINDOW)
    stacked = torch.cat([y_a, y_b, y_a * y_a, y_b * y_b, y_a * y_b])
    mean_a, mean_b, square_a, square_b, product = _blur(stacked).chunk(5)
    variance_a, variance_b = square_a - mean_a.square(), square_b - mean_b.square()
    covariance = product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a.square() + mean_b.square() + _C1)
    structure = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3))
