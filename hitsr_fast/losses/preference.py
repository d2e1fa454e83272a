"""Preference of an image's own tokens over those of its low-resolution version."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def preference_loss(gap: Tensor, *, beta: float, reduction: Literal["mean", "sum"]) -> Tensor:
    """`-log sigmoid(beta * log(p(z_HR) / p(z_LR)))` of each image.

    Args:
        gap: Floating, `(B, T)`: of each token, the logit of the image's own code minus that of the
            low-resolution version's. The normaliser is the same for both, so that the sum over the tokens is
            the logarithm of the ratio; equal codes give 0.
        beta: Above 0.
        reduction: "sum" takes the paper's product over the tokens. Under it a few hundred tokens decide
            whether the sigmoid is 0 or 1; "mean" keeps it where it has a slope.

    Returns:
        `(B,)`, float32 or wider: `softplus(-beta * reduced gap)`.

    Notes:
        Source: HIT-VAR (arXiv 2506.04990), equation 4.

    Example:
        >>> preference_loss(torch.tensor([[1.0, 3.0]]), beta=1.0, reduction="mean")  # log(1 + exp(-2))
        tensor([0.1269])
    """
    gap = gap.to(torch.promote_types(gap.dtype, torch.float32))
    reduced = gap.mean(1) if reduction == "mean" else gap.sum(1)
    return F.softplus(-beta * reduced)
