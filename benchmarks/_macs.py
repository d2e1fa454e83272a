"""Multiply-adds, counted: sums over the layers of a module, and over the products of a transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from benchmarks.shapes import ModelShape
from hitsr_fast.nn.autoencoder import SpatialAttention


def layer_macs(module: nn.Module, call: Callable[[], Any]) -> int:
    """Of the convolutions, linear layers and attention of a module in a call; on "meta" it computes nothing.

    Norms, activations, additions and resampling are left out.
    """
    total = 0

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, SpatialAttention):  # its layers are seen by themselves: scores, and sums of v
            batch, channels, height, width = output.shape
            total += 2 * batch * channels * (height * width) ** 2
        else:
            total += output.numel() * layer.weight[0].numel()  # type: ignore[index, operator]

    counted = (nn.Conv2d, nn.Linear, SpatialAttention)
    hooks = [layer.register_forward_hook(add) for layer in module.modules() if isinstance(layer, counted)]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return total


def step_macs(shape: ModelShape, step: int, *, injected: bool = False, mlp_ratio: float = 4.0) -> int:
    """Of a transformer for one scale of one image; the first scale comes with the prefix.

    Projections of q, k, v and the output, both of the feed-forward, each token with those that it sees,
    embeddings and classifier. AdaLN depends on the class alone and is no part of it.

    Args:
        shape: of the model.
        step: number of the scale.
        injected: whether the condition is also added to the tokens of each scale.
        mlp_ratio: hidden width of the feed-forward over the width.
    """
    start, rows = shape.step(step)
    length, width = shape.lengths[step], shape.width
    blocks = rows * (4 + 2 * mlp_ratio) * width**2 + 2 * width * rows * (start + rows)
    embedded = (shape.prefix if step == 0 else length) + (length if injected else 0)
    return int(shape.depth * blocks + shape.C * width * embedded + width * shape.K * shape.G * length)
