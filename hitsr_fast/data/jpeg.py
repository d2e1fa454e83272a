"""Baseline JPEG as a tensor operation: a photo after being saved with 4:2:0 chroma and read again.

Source: ITU-T T.81 (the transform, annex K tables) and JFIF 1.02 (YCbCr). The entropy coding is lossless.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.checks import check_image, check_integer, check_number
from hitsr_fast.data.ragged import Size, no_autocast, padded
from hitsr_fast.transfer import to_device

# T.81 tables K.1 (luminance) and K.2 (chrominance), row by row.
_LUMA: Final = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA: Final = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
_RGB_TO_YCBCR: Final = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)
_YCBCR_TO_RGB: Final = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


def jpeg(images: Tensor, quality: float, *, float_quality: bool = False) -> Tensor:
    """Save images as baseline JPEG (4:2:0) and read them back.

    Args:
        images: floating point `(B, 3, H, W)`, RGB in [0, 1]; rounded to 8 bits first, as encoders get it.
        quality: 1 to 100, libjpeg's scale; a whole number unless `float_quality`.
        float_quality: Multiply the annex K tables by a factor of `quality` and leave them so, as no file can;
            else their entries are whole numbers of libjpeg's rule.

    Returns:
        float32 `(B, 3, H, W)` in [0, 1], on the 8-bit grid.

    Raises:
        TypeError, ValueError: an argument is of another type or shape, or out of range.

    Notes:
        Follows libjpeg's defaults: annex K tables scaled by quality, 2x2 mean for chroma, triangle ("fancy")
        upsampling. libjpeg transforms in integers, so now and then a coefficient is rounded the other way.
        Not differentiable: coefficients are rounded.
        With q the quality, the factor of `float_quality` is `50 / q` below 50 and `2 - q / 50` from there on:
        Real-ESRGAN's, whose DiffJPEG has 0 / 0 at 100. Here no entry is below 2^-10.
    """
    check_image("images", images)
    if 0 in images.shape:
        raise ValueError(f"images: expected B, H and W of at least 1, found shape {tuple(images.shape)}")
    if float_quality:
        check_number("quality", quality, 1, 100)
    else:
        check_integer("quality", quality, 1, 100)
    sizes = [(images.shape[-2], images.shape[-1])] * len(images)
    with no_autocast(images.device):
        return jpeg_of_sizes(images.float(), sizes, [quality] * len(images), float_quality=float_quality)


def jpeg_of_sizes(
    images: Tensor, sizes: Sequence[Size], qualities: Sequence[float], *, float_quality: bool = False
) -> Tensor:
    """`jpeg` of a batch whose images have a size (see `data.ragged`) and a quality each; float32."""
    height, width = images.shape[-2:]
    pixels = padded((images * 255).round_().clamp_(0, 255), sizes, 16)

    transform = to_device(torch.tensor(_RGB_TO_YCBCR), images.device)
    ycc = torch.einsum("oc,bchw->bohw", transform, pixels)
    luma = ycc[:, :1].round() - 128  # level shift; chroma is centred on zero already
    mean = F.avg_pool2d(ycc[:, 1:].round(), 2)
    rounding = to_device(torch.tensor((0.25, 0.5)), mean.device)  # libjpeg's, down and up in turns
    chroma = (mean + rounding.repeat(mean.shape[-1] // 2)).floor_()

    tables = _float_tables if float_quality else _whole_tables
    luma = _code_blocks(luma, to_device(tables(_LUMA, qualities), images.device))
    chroma = _code_blocks(chroma, to_device(tables(_CHROMA, qualities), images.device))

    # An image ends with its last block of 16 pixels: upsampling must not look beyond.
    chroma = padded(chroma, [(-(-rows // 16) * 8, -(-columns // 16) * 8) for rows, columns in sizes], 1)
    chroma = F.interpolate(chroma, scale_factor=2.0, mode="bilinear", align_corners=False)
    inverse = to_device(torch.tensor(_YCBCR_TO_RGB), images.device)
    rgb = torch.einsum("oc,bchw->bohw", inverse, torch.cat((luma + 128, chroma), dim=1))
    return rgb[:, :, :height, :width].round().clamp_(0, 255) / 255


def _code_blocks(plane: Tensor, tables: Tensor) -> Tensor:
    """Transform, quantise, de-quantise and invert each 8x8 block of `(B, C, H, W)`, sides multiples of 8."""
    batch, channels, height, width = plane.shape
    dct = _dct_matrix(plane.device)
    strips = (batch, channels, height // 8, 8, width)
    across = (dct @ plane.reshape(strips)).reshape(-1, 8) @ dct.T
    coefficients = across.view(batch, channels, height // 8, 8, width // 8, 8) / tables
    coefficients = coefficients.round_().mul_(tables)
    blocks = dct.T @ (coefficients.view(-1, 8) @ dct).view(strips)
    return blocks.round_().clamp_(-128, 127).view(plane.shape)


@lru_cache(maxsize=8)
def _dct_matrix(device: torch.device) -> Tensor:
    """Orthonormal 8-point DCT-II, float32 `(8, 8)`, frequency by position."""
    position = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos(math.pi / 8 * (position[None, :] + 0.5) * position[:, None]) / 2
    matrix[0] /= math.sqrt(2)
    return to_device(matrix.float(), device)


def _float_tables(base: tuple[tuple[int, ...], ...], qualities: Sequence[float]) -> Tensor:
    """Annex K tables times the factors of the qualities, float32 `(B, 1, 1, 8, 1, 8)`."""
    factors = torch.tensor([50 / q if q < 50 else 2 - q / 50 for q in qualities])
    tables = torch.tensor(base) * factors[:, None, None]
    return tables.clamp_(min=2.0**-10)[:, None, None, :, None, :]


def _whole_tables(base: tuple[tuple[int, ...], ...], qualities: Sequence[float]) -> Tensor:
    """Annex K tables at libjpeg's qualities, float32 `(B, 1, 1, 8, 1, 8)` of whole numbers 1 to 255."""
    tables = torch.stack([_whole_table(base, int(quality)) for quality in qualities])
    return tables[:, None, None, :, None, :]


@lru_cache(maxsize=256)
def _whole_table(base: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """Of one quality, float32 `(8, 8)` on the CPU."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    table = torch.tensor(base, dtype=torch.int64)
    return ((table * percent + 50) // 100).clamp(1, 255).float()
