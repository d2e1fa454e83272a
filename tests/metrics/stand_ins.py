"""Weights of the true shapes with random values, the same on every machine: for tests without a network."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.metrics.lpips_package import VGG

_DEPTHS = (2, 2, 3, 3, 3)


def vgg() -> dict[str, Tensor]:
    """VGG16's convolutions under the names of `lpips.safetensors`."""
    rng = np.random.RandomState(16)
    tensors, shapes = {}, iter(VGG)
    for stage, depth in enumerate(_DEPTHS):
        for conv in range(depth):
            side, inputs, outputs = next(shapes)
            weight = rng.standard_normal((outputs, inputs, side, side)) * (2 / (side * side * inputs)) ** 0.5
            tensors[f"vgg.convs.{stage}.{conv}.weight"] = torch.from_numpy(weight.astype(np.float32))
            bias = 0.1 * rng.standard_normal(outputs)
            tensors[f"vgg.convs.{stage}.{conv}.bias"] = torch.from_numpy(bias.astype(np.float32))
    return tensors


def dists_heads() -> dict[str, Tensor]:
    """`alpha` and `beta`, `(1475,)`."""
    rng = np.random.RandomState(17)
    return {name: torch.from_numpy(rng.rand(1475).astype(np.float32)) for name in ("alpha", "beta")}


def niqe_parameters() -> dict[str, Tensor]:
    """`mean` `(36,)`, `covariance` `(36, 36)` and `window` `(7, 7)`, float64."""
    rng = np.random.RandomState(18)
    mixing = rng.standard_normal((36, 36)) / 6
    x = np.arange(7) - 3
    window = np.exp(-(x[:, None] ** 2 + x[None, :] ** 2) / (2 * (7 / 6) ** 2))
    return {
        "mean": torch.from_numpy(rng.rand(36)),
        "covariance": torch.from_numpy(mixing @ mixing.T + 0.1 * np.eye(36)),
        "window": torch.from_numpy(window / window.sum()),
    }
