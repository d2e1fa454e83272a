"""`group_norm_silu`: what stands before each convolution of the autoencoder, in two passes over the map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hitsr_fast.reference.group_norm_silu as reference
from hitsr_fast.backends import UP_TO_FLOAT32, Launch, Native
from hitsr_fast.checks import FLOATING, MAX_INT, check_integer, check_positive, check_shape, check_tensor
from hitsr_fast.dispatch import Gradient, op
from hitsr_fast.ops import group_norm_silu_triton as triton


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, *, eps: float = 1e-6) -> Tensor:
    """SiLU of a group norm: `y / (1 + exp(-y))` of `y = (x - mean) / sqrt(var + eps) * weight + bias`.

    Mean and variance (of the population) are those of an image's C / groups neighbouring channels.

    Args:
        x: float16, bfloat16, float32 or float64, `(B, C, H, W)`, C at least 1. Any strides; contiguous and
            channels-last maps are read as they lie.
        weight: of those dtypes, `(C,)`.
        bias: of those dtypes, `(C,)`.
        groups: a divisor of C.
        eps: added to the variance, above 0.

    Returns:
        `(B, C, H, W)` in the dtype of x; channels-last where the channels of x lie side by side, else
        contiguous.

    Raises:
        TypeError: an argument is not a tensor of those dtypes.
        ValueError: a shape or device does not fit, `groups` does not divide C, or eps is not above 0.

    Notes:
        Computed in float32 (float64 where an argument has it) and rounded once. Deterministic, on any number
        of threads.
        Gradient: in x, weight and bias, by an op of its own, deterministic; of x, for which alone memory is
        kept, the normalised map and its SiLU are computed again.
        Backends: triton, cpu (both all dtypes but float64), reference.
        Source: group norm (arXiv 1803.08494) and SiLU as VAR's autoencoder (arXiv 2404.02905) has them.

    Example:
        >>> x = torch.tensor([1.0, 3.0, 5.0, 5.0]).view(1, 2, 1, 2)
        >>> group_norm_silu(x, torch.ones(2), torch.tensor([0.0, 9.0]), 2).flatten()
        tensor([-0.2689,  0.7311,  8.9989,  8.9989])
    """
    check_tensor("x", x, FLOATING)
    check_shape("x", x, "B C H W")
    C = x.shape[1]
    if C == 0:
        raise ValueError(f"x: expected C of at least 1, found shape {tuple(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        check_tensor(name, value, FLOATING, like=x)
        check_shape(name, value, "C", C=C)
    check_integer("groups", groups, -MAX_INT)
    if groups < 1 or C % groups != 0:
        raise ValueError(f"groups: expected a divisor of C = {C}, found {groups}")
    check_positive("eps", eps)
    out: Tensor = _group_norm_silu(x, weight, bias, groups, eps)[0]
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _gradient(ctx: Any, grad: Tensor, *_rest: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, *ctx.saved_tensors), None, None)


@op(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, SymInt groups, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.group_norm_silu,
    triton=Launch(triton.group_norm_silu_triton, limits=triton.LIMITS, unless=triton.unsupported),
    native=Native("_group_norm_silu", dtypes=UP_TO_FLOAT32),
    gradient=Gradient(_save, _gradient),
)
def _group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = any(t.dtype == torch.float64 for t in (x, weight, bias))
    dtype = torch.float64 if wide else torch.float32
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=dtype) for _ in range(2))
    return torch.empty_like(x, memory_format=reference.memory_format(x)), mean, rstd


@op(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.group_norm_silu_backward,
    triton=Launch(triton.group_norm_silu_backward_triton, limits=triton.LIMITS),
    native=Native("_group_norm_silu_backward", dtypes=UP_TO_FLOAT32),
)
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=reference.memory_format(x))
    return grad_x, weight.new_empty(weight.shape), bias.new_empty(bias.shape)
