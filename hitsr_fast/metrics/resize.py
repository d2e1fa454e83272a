"""Bicubic resizing as MATLAB's `imresize` does it, the one that defines the usual test sets."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, torch.zeros_like(x)))


def _weights(size: int, scale: float) -> Tensor:
    """The float64 matrix `(ceil(size * scale), size)` that resizes one axis."""
    # Scaling down stretches the kernel, which keeps out what the smaller grid cannot hold.
    stretch = max(1.0, 1.0 / scale)
    reach = 2 * stretch
    out = math.ceil(size * scale)
    # Pixel i covers [i, i + 1): its centre lies at i + 0.5 on both grids.
    centre = (torch.arange(out, dtype=torch.float64) + 0.5) / scale - 0.5
    taps = torch.floor(centre - reach).long()[:, None] + torch.arange(math.ceil(2 * reach) + 2)
    weights = _cubic((centre[:, None] - taps) / stretch)
    weights = weights / weights.sum(dim=1, keepdim=True)
    # Beyond the edge the image is mirrored: ..., 1, 0, 0, 1, ...
    taps = taps % (2 * size)
    taps = torch.where(taps < size, taps, 2 * size - 1 - taps)
    return torch.zeros(out, size, dtype=torch.float64).scatter_add_(1, taps, weights)


def imresize(images: Tensor, scale: float) -> Tensor:
    """Resize images bicubically, antialiased, with MATLAB's conventions.

    Args:
        images: floating point, `(..., H, W)`.
        scale: factor for both axes; 0.25 makes the LR image of a x4 pair.

    Returns:
        The dtype of `images`, `(..., ceil(H * scale), ceil(W * scale))`. Values may leave the input's range.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: fewer than two axes, an empty axis, or `scale` not positive and finite.

    Notes:
        Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981, with a = -0.5; the kernel
        is stretched by 1/scale when scaling down. Beyond the edge the image is mirrored, as in recent
        MATLAB; older versions, with which the LR files of Set5 and Set14 were made, repeat the edge pixel,
        which differs in the outermost two pixels. Given 8-bit images MATLAB also rounds after each of the two
        passes, the vertical one first; this function never rounds.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor, found {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"images: expected a floating-point tensor, found {images.dtype}")
    if images.ndim < 2 or 0 in images.shape[-2:]:
        raise ValueError(f"images: expected shape (..., H, W) with H, W > 0, found {tuple(images.shape)}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive finite number, found {scale}")
    height, width = (_weights(size, scale).to(images) for size in images.shape[-2:])
    return height @ images @ width.T
