"""Decoded image files as rows for a model, and its rows as pictures.

Colours are premultiplied for the model, so that what lies under a transparent pixel cannot bleed into its
neighbours; alpha itself is enlarged by bicubic interpolation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.imaging.io import Picture
from hitsr_fast.pipeline.tiles import ReadRows

# A bicubic output pixel depends on input rows at most two away; the third is margin.
_BICUBIC_REACH = 3


def enlarged_rows(read_rows: ReadRows, begin: int, end: int, height: int, factor: int) -> Tensor:
    """Some rows of an image enlarged by bicubic interpolation, from the rows that they depend on only.

    Args:
        read_rows: `(begin, end)` -> those rows of the image as (B, C, end - begin, W) floating.
        begin: first row of the enlarged image.
        end: one past the last.
        height: rows of the image.
        factor: how much larger.

    Returns:
        (B, C, end - begin, W * factor), not clamped.
    """
    first = max(begin // factor - _BICUBIC_REACH, 0)
    stop = min(-(-end // factor) + _BICUBIC_REACH, height)
    rows = read_rows(first, stop)
    if factor > 1:
        rows = F.interpolate(rows, scale_factor=factor, mode="bicubic", align_corners=False)
    return rows[:, :, begin - first * factor : end - first * factor]


def blank(picture: Picture, factor: int) -> Picture:
    """A picture `factor` times as large, whose samples are not set."""
    height, width, channels = picture.pixels.shape
    size, dtype = (height * factor, width * factor), picture.pixels.dtype
    return replace(
        picture,
        pixels=np.empty((*size, channels), dtype),
        alpha=None if picture.alpha is None else np.empty(size, dtype),
    )


def alpha_rows(picture: Picture, begin: int, end: int) -> Tensor:
    """Rows of a picture's alpha as (1, 1, end - begin, W) float32 in [0, 1]."""
    assert picture.alpha is not None
    return torch.from_numpy(picture.alpha[begin:end].astype(np.float32) / picture.max_value)[None, None]


def colour_rows(picture: Picture, begin: int, end: int) -> Tensor:
    """Rows of a picture as the model sees them: (1, 3, end - begin, W) float32 in [0, 1]."""
    pixels = picture.pixels[begin:end].astype(np.float32) / picture.max_value
    rows = torch.from_numpy(pixels).permute(2, 0, 1)[None].expand(-1, 3, -1, -1)
    return rows if picture.alpha is None else rows * alpha_rows(picture, begin, end)


def output_picture(picture: Picture, factor: int, top: int, image: Tensor) -> Picture:
    """Rows `image` (1, 3, n, W * factor) in [0, 1], from row `top` on, as of the enlarged `picture`."""
    image, alpha = image.cpu(), None
    if picture.alpha is not None:
        opacity = enlarged_rows(
            lambda begin, end: alpha_rows(picture, begin, end),
            top,
            top + image.shape[2],
            picture.height,
            factor,
        ).clamp(0, 1)
        alpha = _quantised(opacity[0, 0], picture)
        image = (image / opacity.clamp_min(1 / picture.max_value)).clamp(max=1)
    if picture.pixels.shape[2] == 1:
        image = image.mean(dim=1, keepdim=True)
    return replace(picture, pixels=_quantised(image[0].permute(1, 2, 0), picture), alpha=alpha)


def _quantised(x: Tensor, like: Picture) -> np.ndarray[Any, Any]:
    return (x * like.max_value).round().numpy().astype(like.pixels.dtype)
