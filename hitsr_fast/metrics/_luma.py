"""The luma channel on which PSNR and SSIM are measured."""

from __future__ import annotations

from torch import Tensor

from hitsr_fast.checks import check_pair


def luma(image: Tensor) -> Tensor:
    """Y of BT.601 as MATLAB's `rgb2ycbcr` computes it for `(B, 3, H, W)` RGB in [0, 1], times 255.

    The result is float64 `(B, 1, H, W)`, 16 for black to 235 for white.
    """
    image = image.double()
    red, green, blue = image[:, 0:1], image[:, 1:2], image[:, 2:3]
    return 16.0 + 65.481 * red + 128.553 * green + 24.966 * blue


def cropped_luma(a: Tensor, b: Tensor, *, border: int, min_side: int) -> tuple[Tensor, Tensor]:
    """Luma of two image batches without the border, of which a side of at least `min_side` must be left.

    Raises:
        TypeError, ValueError: as `check_pair`; ValueError also for a negative border.
    """
    if border < 0:
        raise ValueError(f"border: expected at least 0, found {border}")
    check_pair(a, b, min_side=min_side + 2 * border)
    inner = slice(border, -border or None)
    return luma(a[..., inner, inner]), luma(b[..., inner, inner])
