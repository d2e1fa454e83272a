"""The unsharp mask by which Real-ESRGAN sharpens photos before it degrades them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hitsr_fast.checks import check_image, check_integer, check_number
from hitsr_fast.data.blur_kernels import gaussian_kernel
from hitsr_fast.data.ragged import blur, no_autocast


def unsharp_mask(images: Tensor, weight: float = 0.5, radius: int = 50, threshold: float = 10.0) -> Tensor:
    """Sharpen where an image differs from its blurred self, and leave it alone elsewhere.

    With G a Gaussian blur, x an image and `d = x - G x`, the result is `m clip(x + weight d) + (1 - m) x`,
    where `m = G [255 |d| > threshold]` is a mask with soft edges; all for each channel.

    Args:
        images: floating point `(B, 3, H, W)`, RGB in [0, 1].
        weight: of the difference, not negative.
        radius: side in pixels of the blur's kernel, or one less than it where it is even. The standard
            deviation is `0.3 ((side - 1) / 2 - 1) + 0.8`, OpenCV's for a side: 8 pixels for the default.
        threshold: difference in 8-bit levels above which a pixel is sharpened.

    Returns:
        float32 `(B, 3, H, W)` in [0, 1], on `images`' device.

    Raises:
        TypeError, ValueError: an argument is of another type or shape, or out of range.

    Notes:
        Wang et al., "Real-ESRGAN", 2021, which trains with sharpened photos; the numbers are those of its
        code. Images are mirrored at their borders, also such as are smaller than the kernel.
    """
    check_image("images", images)
    if 0 in images.shape:
        raise ValueError(f"images: expected B, H and W of at least 1, found shape {tuple(images.shape)}")
    check_number("weight", weight, 0)
    check_integer("radius", radius, 1)
    check_number("threshold", threshold, 0)
    kernel, size = _kernel(radius + 1 - radius % 2), (images.shape[-2], images.shape[-1])
    with no_autocast(images.device):
        images = images.float()
        difference = images - blur(images, [size], [kernel])
        mask = blur((difference.abs() * 255 > threshold).float(), [size], [kernel])
        sharp = (images + weight * difference).clamp_(0, 1)
        return torch.lerp(images, sharp, mask.clamp_(0, 1))


@lru_cache(maxsize=4)
def _kernel(side: int) -> Tensor:
    """The Gaussian of OpenCV's standard deviation for a side, float64 `(side, side)`."""
    sigma = 0.3 * ((side - 1) * 0.5 - 1) + 0.8
    return gaussian_kernel(side, sigma, sigma)
