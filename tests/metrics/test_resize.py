from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.metrics import imresize
from tests.tolerances import TOLERANCES

SCALES = st.sampled_from([0.25, 0.5, 1 / 3, 0.3, 1.0, 1.5, 2.0, 4.0])


def line(length: int, seed: int = 0) -> Tensor:
    return torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def keys_cubic(x: float) -> float:
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def expected_line(values: list[float], scale: float) -> list[float]:
    """MATLAB's algorithm for one axis, with its one-based indices, one pixel at a time."""
    n, shrink = len(values), min(scale, 1.0)
    mirrored = list(range(1, n + 1)) + list(range(n, 0, -1))
    result = []
    for x in range(1, math.ceil(n * scale) + 1):
        u = x / scale + 0.5 * (1 - 1 / scale)
        left = math.floor(u - 2 / shrink)
        taps = range(left, left + math.ceil(4 / shrink) + 2)
        weights = [shrink * keys_cubic(shrink * (u - tap)) for tap in taps]
        picked = [values[mirrored[(tap - 1) % (2 * n)] - 1] for tap in taps]
        result.append(sum(w * v for w, v in zip(weights, picked, strict=True)) / sum(weights))
    return result


@given(length=st.integers(1, 20), scale=SCALES, seed=st.integers(0, 100))
def test_equals_matlabs_algorithm(length: int, scale: float, seed: int) -> None:
    values = line(length, seed)
    expected = torch.tensor(expected_line(values.tolist(), scale), dtype=torch.float64)
    column = imresize(values[:, None].expand(length, 8), scale)
    assert column.shape == (math.ceil(length * scale), math.ceil(8 * scale))
    torch.testing.assert_close(column[:, 0], expected, **TOLERANCES["float64_reordered"]._asdict())
    row = imresize(values[None, :].expand(8, length), scale)
    torch.testing.assert_close(row[0], expected, **TOLERANCES["float64_reordered"]._asdict())


def test_half_size_weights() -> None:
    """The eight taps of half size, in 1/256: -3 -9 29 111 111 29 -9 -3."""
    impulse = torch.eye(16, dtype=torch.float64)[:, :, None].expand(16, 16, 16)
    response = imresize(impulse, 0.5)[:, 4, 4]
    expected = torch.zeros(16, dtype=torch.float64)
    expected[5:13] = torch.tensor([-3, -9, 29, 111, 111, 29, -9, -3]) / 256
    torch.testing.assert_close(response, expected, **TOLERANCES["float64_reordered"]._asdict())


@given(scale=SCALES, height=st.integers(2, 17), width=st.integers(2, 17))
def test_keeps_constants_and_symmetry(scale: float, height: int, width: int) -> None:
    flat = torch.full((2, 3, height, width), 0.7, dtype=torch.float64)
    resized = imresize(flat, scale)
    assert resized.shape == (2, 3, math.ceil(height * scale), math.ceil(width * scale))
    expected = torch.full_like(resized, 0.7)
    torch.testing.assert_close(resized, expected, **TOLERANCES["float64_reordered"]._asdict())
    image = line(height * width).view(height, width)
    turned = imresize(image.T, scale)
    torch.testing.assert_close(turned, imresize(image, scale).T, **TOLERANCES["float64_reordered"]._asdict())


def test_keeps_ramps_away_from_the_edge() -> None:
    ramp = torch.arange(64.0, dtype=torch.float64)[:, None].expand(64, 8)
    quarter = imresize(ramp, 0.25)[3:-3, 0]
    expected = torch.arange(16.0, dtype=torch.float64)[3:-3] * 4 + 1.5
    torch.testing.assert_close(quarter, expected, **TOLERANCES["float64_reordered"]._asdict())


def test_keeps_the_dtype() -> None:
    image = line(64).view(8, 8)
    for dtype in (torch.float32, torch.float64):
        assert imresize(image.to(dtype), 0.5).dtype == dtype


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"images: expected a floating-point tensor, found torch\.uint8"):
        imresize(torch.zeros(4, 4, dtype=torch.uint8), 0.5)
    with pytest.raises(TypeError, match="images: expected a tensor, found int"):
        imresize(3, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images: expected shape \(\.\.\., H, W\)"):
        imresize(torch.zeros(4, 0), 0.5)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale: expected a positive finite number"):
            imresize(torch.zeros(4, 4), scale)
