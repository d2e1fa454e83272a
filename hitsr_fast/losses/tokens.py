"""Cross entropy of a token pyramid, with a weight a scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def token_weights(scales: Sequence[int], balance: float) -> Tensor:
    """Weight of each token in the loss, `(T,)` of mean one: `L ** -balance` for a scale of L tokens."""
    weights = torch.cat([torch.full((side * side,), float(side * side) ** -balance) for side in scales])
    return weights / weights.mean()


def token_loss(logits: Tensor, labels: Tensor, weights: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Weighted mean of the tokens' cross entropies.

    Args:
        logits: Floating, `(B, T, K)`.
        labels: int64 `(B, T)`.
        weights: Floating, `(T,)`, of mean one.
        label_smoothing: Share of the target that is spread over all codes.

    Returns:
        Scalar `mean over b, t of weights[t] * cross_entropy(logits[b, t], labels[b, t])`.

    Example:
        >>> import torch
        >>> token_loss(torch.zeros(1, 3, 8), torch.tensor([[0, 5, 7]]), torch.ones(3))  # log 8
        tensor(2.0794)
    """
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=label_smoothing, reduction="none"
    )
    return (losses.view_as(labels) * weights).mean()
