"""The channels on which PSNR and SSIM are measured, without the border."""

from __future__ import annotations

from torch import Tensor

from hitsr_fast.checks import check_image, check_integer, check_pair


def luma(image: Tensor) -> Tensor:
    """Y of BT.601 as MATLAB's `rgb2ycbcr` computes it for `(B, 3, H, W)` RGB in [0, 1], times 255.

    The result is float64 `(B, 1, H, W)`, 16 for black to 235 for white.
    """
    image = image.double()
    red, green, blue = image[:, 0:1], image[:, 1:2], image[:, 2:3]
    return 16.0 + 65.481 * red + 128.553 * green + 24.966 * blue


def rgb(image: Tensor) -> Tensor:
    """`(B, 3, H, W)` RGB in [0, 1] as float64 in [0, 255]."""
    return image.double() * 255.0


def inner_pair(a: Tensor, b: Tensor, *, border: int, min_side: int) -> tuple[Tensor, Tensor]:
    """Two image batches without the border, of which a side of at least `min_side` must be left.

    Raises:
        TypeError, ValueError: as `check_pair`; also for a border that is not an integer, or a negative one.
    """
    check_integer("border", border, 0)
    check_pair(a, b, min_side=min_side + 2 * border)
    return inner(a, border), inner(b, border)


def inner_image(name: str, image: Tensor, *, border: int, min_side: int) -> Tensor:
    """One image batch without the border; errors are those of `inner_pair`."""
    check_integer("border", border, 0)
    check_image(name, image)
    if min(image.shape[2:]) < min_side + 2 * border:
        expected = f"sides of at least {min_side + 2 * border} px"
        raise ValueError(f"{name}: expected {expected}, found {tuple(image.shape[2:])}")
    return inner(image, border)


def inner(image: Tensor, border: int) -> Tensor:
    """`(..., H, W)` without `border` pixels at each side."""
    kept = slice(border, -border or None)
    return image[..., kept, kept]
