"""Kernels against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hitsr_fast.data.blur_kernels import gaussian_kernel, sinc_kernel
from tests.tolerances import TOLERANCES

SIZES = st.integers(3, 10).map(lambda half: 2 * half + 1)
SIGMAS = st.floats(0.2, 3.0)


@given(SIZES, SIGMAS, SIGMAS, st.floats(-4, 4), st.sampled_from(["gaussian", "generalized", "plateau"]))
def test_gaussian_family(size: int, sigma_x: float, sigma_y: float, angle: float, profile: str) -> None:
    kernel = gaussian_kernel(size, sigma_x, sigma_y, angle, profile=profile, beta=0.7)
    torch.testing.assert_close(kernel.sum().item(), 1.0, **TOLERANCES["float64_reordered"]._asdict())
    assert kernel.min() >= 0
    assert kernel.max() == kernel[size // 2, size // 2]
    torch.testing.assert_close(kernel, kernel.flip(0, 1))  # even under x -> -x
    swapped = gaussian_kernel(size, sigma_y, sigma_x, angle + math.pi / 2, profile=profile, beta=0.7)
    torch.testing.assert_close(kernel, swapped)


def test_gaussian_variances() -> None:
    kernel = gaussian_kernel(21, 1.0, 2.0)
    axis = torch.arange(21, dtype=torch.float64) - 10
    variance_y, variance_x = (kernel.sum(1) * axis**2).sum(), (kernel.sum(0) * axis**2).sum()
    torch.testing.assert_close(variance_x.item(), 1.0, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(variance_y.item(), 4.0, rtol=1e-3, atol=0.0)


def test_beta_one_is_a_gaussian() -> None:
    torch.testing.assert_close(
        gaussian_kernel(15, 2, 1, 0.3, profile="generalized", beta=1.0), gaussian_kernel(15, 2, 1, 0.3)
    )


@given(SIZES, st.floats(math.pi / 5, math.pi))
def test_sinc(size: int, cutoff: float) -> None:
    kernel = sinc_kernel(size, cutoff)
    torch.testing.assert_close(kernel.sum().item(), 1.0, **TOLERANCES["float64_reordered"]._asdict())
    torch.testing.assert_close(kernel, kernel.T)
    torch.testing.assert_close(kernel, kernel.flip(0))
    assert kernel.max() == kernel[size // 2, size // 2]


def test_sinc_is_a_low_pass() -> None:
    response = np.abs(np.fft.fft2(sinc_kernel(21, math.pi / 2).numpy(), (64, 64)))
    frequency = 2 * math.pi * np.abs(np.fft.fftfreq(64))
    radius = np.hypot(frequency[:, None], frequency[None, :])
    assert response[radius < 0.3 * math.pi].min() > 0.8
    assert response[radius > 0.7 * math.pi].max() < 0.2


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="size"):
        gaussian_kernel(4, 1, 1)
    with pytest.raises(ValueError, match="sigma"):
        gaussian_kernel(5, 0, 1)
    with pytest.raises(ValueError, match="profile"):
        gaussian_kernel(5, 1, 1, profile="box")
    with pytest.raises(ValueError, match="cutoff"):
        sinc_kernel(5, 4.0)
