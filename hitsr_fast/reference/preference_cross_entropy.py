"""Definition of the linear head's cross entropy with the gap of each row's target to a rejected token."""

from __future__ import annotations

import torch
from torch import Tensor


def preference_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rejected: Tensor,
    label_smoothing: float,
    units: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the logits `hidden @ weight.T + bias`, hidden `(N, C)` and weight `(K, C)`.

    Returns:
        loss, gap, lse: `(N,)`, float32 or float64: cross entropy, logit of the target less that of the
            rejected token, and logarithm of the sum of exponentials.
        unit_hidden, unit_weight, unit_bias: gradients of the losses' sum in that dtype, if `units`; else, and
            the last without a bias, `(0,)`.
    """
    logits = _logits(hidden, weight, bias)
    lse = logits.logsumexp(1)
    chosen, refused = (logits.gather(1, tokens[:, None]).squeeze(1) for tokens in (target, rejected))
    loss = lse - (1 - label_smoothing) * chosen - label_smoothing * logits.mean(1)
    found = (loss, chosen - refused, lse)
    if not units:
        none = [logits.new_empty(0) for _ in range(3)]
        return *found, none[0], none[1], none[2]
    ones, zeros = torch.ones_like(loss), torch.zeros_like(loss)
    return *found, *_gradients(ones, zeros, hidden, weight, bias, target, rejected, lse, label_smoothing)


def preference_cross_entropy_backward(
    grad_loss: Tensor,
    grad_gap: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rejected: Tensor,
    lse: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in hidden, weight and bias, in their dtypes; the last `(0,)` without a bias.

    That in logit k of a row, with e the label smoothing and p the softmax:
    `grad_loss (p_k - e / K - (1 - e) [k = target]) + grad_gap ([k = target] - [k = rejected])`.
    """
    grads = _gradients(grad_loss, grad_gap, hidden, weight, bias, target, rejected, lse, label_smoothing)
    like = (hidden, weight, hidden if bias is None else bias)
    grad_hidden, grad_weight, grad_bias = (g.to(t.dtype) for g, t in zip(grads, like, strict=True))
    return grad_hidden, grad_weight, grad_bias


def _gradients(
    grad_loss: Tensor,
    grad_gap: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rejected: Tensor,
    lse: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = _logits(hidden, weight, bias)
    of_loss, of_gap = grad_loss.to(logits.dtype), grad_gap.to(logits.dtype)
    given = (logits - lse.to(logits.dtype)[:, None]).exp() - label_smoothing / len(weight)
    given *= of_loss[:, None]
    given.scatter_add_(1, target[:, None], (of_gap - (1 - label_smoothing) * of_loss)[:, None])
    given.scatter_add_(1, rejected[:, None], -of_gap[:, None])
    grad_bias = given.new_empty(0) if bias is None else given.sum(0)
    return given @ weight.to(given.dtype), given.mT @ hidden.to(given.dtype), grad_bias


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32, or in float64 where an argument is."""
    tensors = [t for t in (hidden, weight, bias) if t is not None]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.nn.functional.linear(*(t.to(dtype) for t in tensors))
