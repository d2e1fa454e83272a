"""PSNR on the luma channel and on RGB."""

from __future__ import annotations

from torch import Tensor

from hitsr_fast.metrics._pairs import inner_pair, luma, rgb


def psnr_y(a: Tensor, b: Tensor, border: int = 4) -> Tensor:
    """Peak signal-to-noise ratio on luma, in dB; higher is closer.

    Args:
        a: floating point, `(B, 3, H, W)` RGB in [0, 1].
        b: the same shape and device.
        border: pixels left out on each side; by custom the scale factor of super-resolution.

    Returns:
        float64 `(B,)`; infinity for equal images.

    Raises:
        TypeError: not floating-point tensors, or `border` is not an integer.
        ValueError: shapes or devices differ, a negative border, or nothing is left within the border.

    Notes:
        `10 log10(255^2 / MSE)` on Y of BT.601 (MATLAB's `rgb2ycbcr`, range 16 to 235, not rounded).
    """
    a, b = inner_pair(a, b, border=border, min_side=1)
    return _psnr(luma(a), luma(b))


def psnr_rgb(a: Tensor, b: Tensor, border: int = 0) -> Tensor:
    """Peak signal-to-noise ratio on RGB, in dB; higher is closer.

    Arguments, result and errors are those of `psnr_y`.

    Notes:
        `10 log10(1 / MSE)` with one mean of the squared error over all pixels and the three channels, not
        the mean of three PSNRs.
    """
    a, b = inner_pair(a, b, border=border, min_side=1)
    return _psnr(rgb(a), rgb(b))


def _psnr(a: Tensor, b: Tensor) -> Tensor:
    """Of images in [0, 255]."""
    mse = (a - b).square().mean(dim=(1, 2, 3))
    return 10.0 * (255.0**2 / mse).log10()
