"""The losses of a token pyramid, a weight a scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def token_weights(lengths: Sequence[int], balance: float) -> Tensor:
    """Weight of each token in the loss, float32 `(T,)` of mean one: `L ** -balance` for a scale of L tokens.

    Example:
        >>> token_weights([1, 4], balance=1.0)
        tensor([2.5000, 0.6250, 0.6250, 0.6250, 0.6250])
    """
    weights = torch.cat([torch.full((length,), float(length) ** -balance) for length in lengths])
    return weights / weights.mean()


def token_loss(cross_entropy: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over each image's tokens.

    Args:
        cross_entropy: Floating, `(B, T)`.
        weights: Floating, `(T,)`, of mean one.

    Returns:
        `(B,)`, `mean over t of weights[t] * cross_entropy[b, t]`.

    Example:
        >>> token_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([1.5, 0.5]))
        tensor([1.5000])
    """
    return (cross_entropy * weights).mean(1)


def scale_means(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mean over the batch and each scale's tokens: `(S,)` of `(B, T)`.

    Example:
        >>> scale_means(torch.tensor([[1.0, 2.0, 2.0, 2.0, 6.0]]), [1, 4])
        tensor([1., 3.])
    """
    return torch.stack([part.mean() for part in values.split(list(lengths), dim=1)])
