"""Strengths and probabilities of the two-order degradation (`hitsr_fast.data.degradation`); without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from hitsr_fast.configs import Config, Count, Share, Weight

KERNEL_SHAPES: Final = (
    "iso",
    "aniso",
    "generalized_iso",
    "generalized_aniso",
    "plateau_iso",
    "plateau_aniso",
)

DegradationName = Literal["x4plus", "varsr", "real-esrgan"]
"""Of a preset, see `PRESETS`."""


def _check_distribution(name: str, values: tuple[float, ...]) -> None:
    if min(values) < 0 or not math.isclose(sum(values), 1, abs_tol=1e-6):
        raise ValueError(f"{name}: expected probabilities that sum to 1, found {values}")


@dataclass(frozen=True)
class OrderConfig(Config):
    """One order of the degradation: blur, resize, noise, JPEG. Ranges are (low, high), probs are chances."""

    blur_prob: Share = 1.0  # of blurring at all
    sinc_prob: Share = 0.1  # that the blur kernel is a sinc filter rather than a Gaussian-like one
    sigma_range: tuple[float, float] = (0.2, 3.0)  # standard deviation of Gaussian-like kernels, in pixels
    resize_probs: tuple[float, float, float] = (0.2, 0.7, 0.1)  # of resizing up, down, not at all
    resize_range: tuple[float, float] = (0.15, 1.5)  # smallest factor downwards, largest upwards
    gaussian_noise_prob: Share = 0.5  # of Gaussian noise; Poisson noise otherwise
    gaussian_noise_range: tuple[float, float] = (1.0, 30.0)  # its standard deviation, in 8-bit levels
    # Strength of Poisson noise; 1 is the photon noise of as many photons as the image has levels.
    poisson_scale_range: tuple[float, float] = (0.05, 3.0)
    gray_noise_prob: Share = 0.4  # that the noise is the same in all channels
    jpeg_range: tuple[float, float] = (30, 95)  # quality, both ends included

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_distribution("resize_probs", self.resize_probs)
        for name in ("sigma", "resize", "gaussian_noise", "poisson_scale", "jpeg"):
            low, high = getattr(self, f"{name}_range")
            if not 0 < low <= high:
                raise ValueError(f"{name}_range: expected 0 < low <= high, found ({low}, {high})")
        if not self.resize_range[0] <= 1 <= self.resize_range[1]:
            raise ValueError(f"resize_range: expected a range around 1, found {self.resize_range}")
        if self.jpeg_range[0] < 1 or self.jpeg_range[1] > 100:
            raise ValueError(f"jpeg_range: expected qualities from 1 to 100, found {self.jpeg_range}")


_X4PLUS_SECOND: Final = OrderConfig(
    blur_prob=0.8,
    sigma_range=(0.2, 1.5),
    resize_probs=(0.3, 0.4, 0.3),
    resize_range=(0.3, 1.2),
    gaussian_noise_range=(1.0, 25.0),
    poisson_scale_range=(0.05, 2.5),
)


@dataclass(frozen=True)
class DegradationConfig(Config):
    """The whole degradation; the defaults are `REAL_ESRGAN`."""

    # Before it, the HR image is sharpened by `unsharp_mask` with this weight; 0 leaves it as it is.
    usm_weight: Weight = 0.0
    usm_radius: Count = 50
    usm_threshold: Weight = 10.0
    first: OrderConfig = field(default_factory=OrderConfig)
    second: OrderConfig = _X4PLUS_SECOND
    # Of the Gaussian-like kernels, in the order of `blur_kernels.KERNEL_SHAPES`.
    kernel_probs: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    kernel_sizes: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)  # sides of the kernels, equally likely
    # Shapes of generalized Gaussians and plateau kernels; half of the draws lie below 1 (or at it).
    generalized_beta_range: tuple[float, float] = (0.5, 4.0)
    plateau_beta_range: tuple[float, float] = (1.0, 2.0)
    final_sinc_prob: Share = 0.8  # of a sinc filter at the end
    # JPEG qualities are drawn as any numbers and scale the tables without rounding; else they are whole
    # numbers, both ends included, and the tables those of a file.
    float_quality: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.kernel_probs) != len(KERNEL_SHAPES):
            raise ValueError(
                f"kernel_probs: expected {len(KERNEL_SHAPES)} numbers, found {len(self.kernel_probs)}"
            )
        _check_distribution("kernel_probs", self.kernel_probs)
        if not self.kernel_sizes or any(size < 1 or size % 2 == 0 for size in self.kernel_sizes):
            raise ValueError(f"kernel_sizes: expected positive odd integers, found {self.kernel_sizes}")
        for name in ("generalized_beta_range", "plateau_beta_range"):
            low, high = getattr(self, name)
            if not 0 < low <= 1 <= high:
                raise ValueError(f"{name}: expected 0 < low <= 1 <= high, found ({low}, {high})")
        if not self.float_quality:
            for order in ("first", "second"):
                qualities = getattr(self, order).jpeg_range
                if any(quality != int(quality) for quality in qualities):
                    expected = "whole numbers, as float_quality is off"
                    raise ValueError(f"{order}.jpeg_range: expected {expected}, found {qualities}")


REAL_ESRGAN: Final = DegradationConfig()
"""Real-ESRGAN's strengths without its sharpening, and with JPEG qualities of files."""
X4PLUS: Final = replace(REAL_ESRGAN, usm_weight=0.5, float_quality=True)
"""All of Real-ESRGAN's x4plus: strong, for photos of unknown history."""
VARSR: Final = DegradationConfig(
    float_quality=True,
    first=OrderConfig(
        resize_range=(0.3, 1.5),
        gaussian_noise_range=(1.0, 15.0),
        poisson_scale_range=(0.05, 2.0),
        jpeg_range=(60, 95),
    ),
    second=replace(
        _X4PLUS_SECOND,
        blur_prob=0.5,
        resize_range=(0.6, 1.2),
        gaussian_noise_range=(1.0, 12.0),
        poisson_scale_range=(0.05, 1.0),
        jpeg_range=(60, 100),
    ),
)
"""Milder, as VARSR trains with; not sharpened."""

PRESETS: Final[Mapping[DegradationName, DegradationConfig]] = {
    "x4plus": X4PLUS,
    "varsr": VARSR,
    "real-esrgan": REAL_ESRGAN,
}
