"""Pearson's test of drawn codes against the distribution that they should have."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def chi_square_bound(freedom: int) -> float:
    """Exceeded by chance once in a million (Wilson and Hilferty's approximation of the quantile)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 4.75 * math.sqrt(spread)) ** 3


def chi_square(drawn: Tensor, probabilities: Tensor) -> float:
    """Of codes against float64 probabilities; those that expect fewer than five draws are one class."""
    counts = drawn.bincount(minlength=len(probabilities)).double()
    expected = probabilities * len(drawn)
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)])
    expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
    return float(((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum())
