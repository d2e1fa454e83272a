"""PSNR on the luma channel."""

from __future__ import annotations

from torch import Tensor

from hitsr_fast.metrics._luma import cropped_luma


def psnr_y(a: Tensor, b: Tensor, border: int = 4) -> Tensor:
    """Peak signal-to-noise ratio on luma, in dB; higher is closer.

    Args:
        a: floating point, `(B, 3, H, W)` RGB in [0, 1].
        b: the same shape and device.
        border: pixels left out on each side; by custom the scale factor of super-resolution.

    Returns:
        float64 `(B,)`; infinity for equal images.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: shapes or devices differ, a negative border, or nothing is left within the border.

    Notes:
        `10 log10(255^2 / MSE)` on Y of BT.601 (MATLAB's `rgb2ycbcr`, range 16 to 235, not rounded).
    """
    y_a, y_b = cropped_luma(a, b, border=border, min_side=1)
    mse = (y_a - y_b).square().mean(dim=(1, 2, 3))
    return 10.0 * (255.0**2 / mse).log10()
