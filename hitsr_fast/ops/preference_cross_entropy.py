"""`preference_cross_entropy`: a linear head with its cross entropy and preference gap, no logits stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hitsr_fast.reference.preference_cross_entropy as reference
from hitsr_fast.backends import UP_TO_FLOAT32, Launch, Native, native
from hitsr_fast.checks import (
    FLOATING,
    INDEX,
    check_index_range,
    check_number,
    check_shape,
    check_tensor,
    has_values,
)
from hitsr_fast.dispatch import Gradient, op
from hitsr_fast.ops import preference_cross_entropy_triton as triton


def preference_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rejected: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of a linear head, and how far each target's logit is above a rejected token's.

    With the logits `o = hidden @ weight.T + bias` and e the label smoothing:
    `loss = logsumexp(o) - (1 - e) o[target] - e mean(o)` and `gap = o[target] - o[rejected]`, that of the
    log-probabilities, too, as the normaliser cancels.

    Args:
        hidden: float16, bfloat16, float32 or float64, `(N, C)`, C at least 1. Any strides.
        weight, bias: of the head, of those dtypes, `(K, C)` with K at least 1, and `(K,)` or None.
        target, rejected: int64 `(N,)` from 0 to K - 1. Where the two are equal, the gap is exactly 0.
        label_smoothing: share of the target that is spread over all K, from 0 to 1.

    Returns:
        loss, gap: `(N,)`, float32, or float64 where an argument is.

    Raises:
        TypeError: an argument is not a tensor of those dtypes, or `label_smoothing` no number.
        ValueError: a shape, device or range does not fit. Tokens are looked into on a CPU alone.

    Notes:
        Accumulation: float32 at least.
        Gradient: in hidden, weight and bias, from both results; deterministic, on any number of threads.
        Source: the DPO term of HIT-VAR (arXiv 2506.04990) compares tokens of the high-resolution image with
            those of the low-resolution one by the logits of one forward.

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> target, rejected = torch.tensor([1, 1]), torch.tensor([0, 1])
        >>> loss, gap = preference_cross_entropy(hidden, weight, None, target, rejected)
        >>> gap, loss
        (tensor([2., 0.]), tensor([0.1269, 0.6931]))
    """
    check_tensor("hidden", hidden, FLOATING)
    check_shape("hidden", hidden, "N C")
    N, C = hidden.shape
    if C == 0:
        raise ValueError(f"hidden: expected C of at least 1, found shape {tuple(hidden.shape)}")
    check_tensor("weight", weight, FLOATING, like=hidden)
    check_shape("weight", weight, "K C", C=C)
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected K of at least 1, found shape {tuple(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias, FLOATING, like=hidden)
        check_shape("bias", bias, "K", K=weight.shape[0])
    for name, tokens in (("target", target), ("rejected", rejected)):
        check_tensor(name, tokens, INDEX, like=hidden)
        check_shape(name, tokens, "N", N=N)
    check_number("label_smoothing", label_smoothing, 0.0, 1.0)
    arguments = (hidden, weight, bias, target, rejected, float(label_smoothing))
    found: tuple[Tensor, ...] = _loss(*arguments, _differentiates_at_once(*arguments))
    return found[0], found[1]


def _differentiates_at_once(hidden: Tensor, weight: Tensor, *rest: Any) -> bool:
    """Whether the forward makes the gradients for losses that count alike, as in a mean.

    It then has the logits at hand, which the backward would have to compute anew.
    """
    if not (torch.is_grad_enabled() and hidden.requires_grad and weight.requires_grad and has_values(hidden)):
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    return _loss.choose(hidden, weight, *rest, True).name == "cpu"


def _check_tokens(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rejected: Tensor, *_: Any
) -> None:
    check_index_range("target", target, len(weight))
    check_index_range("rejected", rejected, len(weight))


def _wide(*tensors: Tensor | None) -> torch.dtype:
    """That of sums."""
    given = [t.dtype for t in tensors if t is not None]
    return torch.float64 if torch.float64 in given else torch.float32


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.label_smoothing, units = inputs
    # Not saved by PyTorch, which would hold them while they become the gradients.
    ctx.units = tuple(unit.detach() for unit in output[3:]) if units else None
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, grad_loss: Tensor | None, grad_gap: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if grad_loss is None and grad_gap is None:
        return (None,) * 7
    *tensors, lse = ctx.saved_tensors
    units, ctx.units = ctx.units, None  # a second backward through the same graph finds none
    of_loss, of_gap = (torch.zeros_like(lse) if grad is None else grad for grad in (grad_loss, grad_gap))
    # Where second derivatives may be asked for, an op must be recorded, which refuses them.
    usable = units is not None and not torch.is_grad_enabled()
    if usable and (factor := _common_factor(of_loss)) is not None:
        hidden, weight, bias, *tokens = tensors
        native("_preference_cross_entropy_rescale", *units, factor, of_gap, hidden, weight, *tokens)
        like = (hidden, weight, units[2] if bias is None else bias)
        grads = tuple(unit.to(tensor.dtype) for unit, tensor in zip(units, like, strict=True))
    else:
        del units
        grads = _loss_backward(of_loss, of_gap, *tensors, lse, ctx.label_smoothing)
    return *grads[:2], None if tensors[2] is None else grads[2], None, None, None, None


def _common_factor(grad: Tensor) -> float | None:
    """The value of all rows, or None where they differ or cannot be looked into."""
    if not has_values(grad) or len(grad) == 0:
        return None
    first = grad[0].item()
    return first if grad.stride(0) == 0 or bool((grad == first).all()) else None


@op(
    "preference_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor rejected, "
    "float label_smoothing, bool units) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.preference_cross_entropy,
    triton=Launch(triton.preference_cross_entropy_triton, limits=triton.LIMITS),
    native=Native("_preference_cross_entropy", dtypes=UP_TO_FLOAT32),
    check=_check_tokens,
    gradient=Gradient(_save, _gradient),
)
def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rejected: Tensor,
    label_smoothing: float,
    units: bool,
) -> tuple[Tensor, ...]:
    dtype = _wide(hidden, weight, bias)
    rows = [hidden.new_empty(hidden.shape[:1], dtype=dtype) for _ in range(3)]
    shapes: list[tuple[int, ...]] = [(0,)] * 3
    if units:
        shapes = [hidden.shape, weight.shape, (0,) if bias is None else bias.shape]
    return *rows, *(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


@op(
    "preference_cross_entropy_backward(Tensor grad_loss, Tensor grad_gap, Tensor hidden, Tensor weight, "
    "Tensor? bias, Tensor target, Tensor rejected, Tensor lse, float label_smoothing) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.preference_cross_entropy_backward,
    triton=Launch(
        triton.preference_cross_entropy_backward_triton,
        limits=[limit._replace(argument=limit.argument or "hidden") for limit in triton.LIMITS],
    ),
    native=Native("_preference_cross_entropy_backward", dtypes=UP_TO_FLOAT32),
)
def _loss_backward(
    grad_loss: Tensor, grad_gap: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    of_bias = hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), of_bias
