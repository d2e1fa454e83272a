"""Random blur kernels of the Real-ESRGAN degradation, built on the CPU in float64.

Source: Wang et al., "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data", 2021,
section 3.2 (blur) and section 3.4 (sinc filters).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

_PROFILES: Final[dict[str, Callable[[Tensor, float], Tensor]]] = {
    "gaussian": lambda q, beta: torch.exp(-0.5 * q),
    "generalized": lambda q, beta: torch.exp(-0.5 * q**beta),
    "plateau": lambda q, beta: 1.0 / (1.0 + q**beta),
}


def gaussian_kernel(
    size: int,
    sigma_x: float,
    sigma_y: float,
    angle: float = 0.0,
    *,
    profile: str = "gaussian",
    beta: float = 1.0,
) -> Tensor:
    """Build a normalised two-dimensional Gaussian-like kernel.

    With `q = xᵀ Σ⁻¹ x` and Σ the covariance of axes `sigma_x`, `sigma_y` turned by `angle`, the profile is
    `exp(-q/2)` (gaussian), `exp(-q^beta/2)` (generalized) or `1/(1 + q^beta)` (plateau).

    Args:
        size: odd side of the kernel in pixels.
        sigma_x, sigma_y: standard deviations along the two axes, in pixels.
        angle: rotation of the axes, in radians.
        profile: "gaussian", "generalized" or "plateau".
        beta: shape exponent; not used by "gaussian".

    Returns:
        float64 `(size, size)`, summing to one.

    Raises:
        ValueError: if `size` is even or not positive, a sigma is not positive, or the profile is unknown.

    Notes:
        Real-ESRGAN, section 3.2; the generalized and plateau families are those of Liu et al., "Estimating
        Generalized Gaussian Blur Kernels for Out-of-Focus Image Deblurring", 2020.
    """
    if profile not in _PROFILES:
        raise ValueError(f"profile: expected one of {sorted(_PROFILES)}, found {profile!r}")
    if sigma_x <= 0 or sigma_y <= 0:
        raise ValueError(f"sigma_x, sigma_y: expected positive numbers, found {sigma_x}, {sigma_y}")
    y, x = _grid(size)
    cos, sin = math.cos(angle), math.sin(angle)
    along, across = (cos * x + sin * y) / sigma_x, (cos * y - sin * x) / sigma_y
    kernel = _PROFILES[profile](along**2 + across**2, beta)
    kernel /= kernel.sum()
    return kernel


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """Build a normalised circular low-pass (sinc) kernel, which rings like over-sharpened photos.

    The cutoff frequency is in radians per pixel, in (0, π]. Side, result and errors are those of
    `gaussian_kernel`, but that entries may be negative.

    Notes:
        Real-ESRGAN, equation 6: `k(r) = ω J₁(ω r) / (2π r)`, with the limit `ω² / 4π` at the centre.
    """
    if not 0 < cutoff <= math.pi:
        raise ValueError(f"cutoff: expected a number in (0, pi], found {cutoff}")
    y, x = _grid(size)
    radius = torch.hypot(x, y)
    centre = size // 2
    radius[centre, centre] = 1.0  # placeholder: the limit is written below
    kernel: Tensor = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[centre, centre] = cutoff**2 / (4 * math.pi)
    kernel /= kernel.sum()
    return kernel


def _grid(size: int) -> tuple[Tensor, Tensor]:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size: expected a positive odd integer, found {size}")
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    return axis[:, None], axis
