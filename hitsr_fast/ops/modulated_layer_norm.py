"""`modulated_layer_norm`, `gated_residual` and both in a row: AdaLN before and after a block's branches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hitsr_fast.reference.modulated_layer_norm as reference
from hitsr_fast.backends import UP_TO_FLOAT32, Launch, Native
from hitsr_fast.checks import FLOATING, check_dtype, check_positive, check_shape, check_tensor
from hitsr_fast.dispatch import Gradient, op
from hitsr_fast.ops import modulated_layer_norm_triton as triton


def modulated_layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Layer norm without affine part, modulated: `(x - mean) / sqrt(var + eps) * (1 + scale) + shift`.

    Args:
        x: float16, bfloat16, float32 or float64, `(B, L, C)`, C at least 1. Any strides.
        scale, shift: of those dtypes, `(B, C)` or `(B, 1, C)`.
        eps: added to the variance, above 0.
        out_dtype: one of those dtypes, for what reads the result; by default that of x.

    Returns:
        `(B, L, C)` in `out_dtype`.

    Raises:
        TypeError: an argument is not a tensor of those dtypes, or `out_dtype` is none of them.
        ValueError: a shape or device does not fit, or eps is not above 0.

    Notes:
        Accumulation: float32 at least; the result is rounded once.
        Gradient: in x, scale and shift, by an op of its own, deterministic.
        Backends: triton (C up to 8192), cpu (both all dtypes but float64), reference.
        Source: AdaLN of DiT (arXiv 2212.09748) as VAR (arXiv 2404.02905) uses it.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0]]])
        >>> modulated_layer_norm(x, torch.ones(1, 2), torch.tensor([[0.0, 5.0]])).round()
        tensor([[[-2.,  7.]]])
    """
    _check_stream(x)
    check_positive("eps", eps)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    check_dtype("out_dtype", out_dtype, FLOATING)
    scale, shift = _rows("scale", scale, x), _rows("shift", shift, x)
    out: Tensor = _norm(x, scale, shift, eps, out_dtype)[0]
    return out


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """A branch added to its input: `x + gate * y`.

    Args:
        x: float16, bfloat16, float32 or float64, `(B, L, C)`. Any strides.
        y: of those dtypes and the shape of x.
        gate: of those dtypes, `(B, C)` or `(B, 1, C)`.

    Returns:
        `(B, L, C)` in the dtype of x.

    Raises:
        TypeError: an argument is not a tensor of those dtypes.
        ValueError: a shape or device does not fit.

    Notes:
        Gradient: in x, y and gate. Accumulation, backends and source are those of `modulated_layer_norm`.

    Example:
        >>> gated_residual(torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.tensor([[2.0, -1.0]]))
        tensor([[[3., 0.]]])
    """
    check_tensor("x", x, FLOATING)
    check_shape("x", x, "B L C")
    _check_branch(x, y)
    out: Tensor = _residual(x, y, _rows("gate", gate, x))
    return out


def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """End of a branch and norm of the next: `gated_residual`, and `modulated_layer_norm` of its result.

    Args:
        x, y, gate: as for `gated_residual`.
        scale, shift, eps, out_dtype: as for `modulated_layer_norm`.

    Returns:
        The sum `(B, L, C)` in the dtype of x, and its norm in `out_dtype`: what the two ops give one after
        the other, bit for bit, in one pass.

    Raises:
        TypeError, ValueError: as the two.
        RuntimeError: an argument asks for a gradient; the op has none.

    Notes:
        Accumulation, backends and source are those of `modulated_layer_norm`.

    Example:
        >>> x, row = torch.ones(1, 1, 2), torch.tensor([[2.0, -1.0]])
        >>> total, normed = gated_residual_norm(x, x, row, torch.zeros(1, 2), torch.zeros(1, 2))
        >>> total, normed.round()
        (tensor([[[3., 0.]]]), tensor([[[ 1., -1.]]]))
    """
    _check_stream(x)
    _check_branch(x, y)
    check_positive("eps", eps)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    check_dtype("out_dtype", out_dtype, FLOATING)
    rows = (_rows(name, t, x) for name, t in (("gate", gate), ("scale", scale), ("shift", shift)))
    out: tuple[Tensor, Tensor] = _residual_norm(x, y, *rows, eps, out_dtype)
    return out


def _check_stream(x: Tensor) -> None:
    """Of what is normalised."""
    check_tensor("x", x, FLOATING)
    check_shape("x", x, "B L C")
    if x.shape[2] == 0:
        raise ValueError(f"x: expected C of at least 1, found shape {tuple(x.shape)}")


def _check_branch(x: Tensor, y: Tensor) -> None:
    check_tensor("y", y, FLOATING, like=x)
    if y.shape != x.shape:
        check_shape("y", y, "B L C", **dict(zip("BLC", x.shape, strict=True)))


def _rows(name: str, value: Tensor, x: Tensor) -> Tensor:
    """`(B, C)` of a checked `(B, C)` or `(B, 1, C)`."""
    check_tensor(name, value, FLOATING, like=x)
    B, _, C = x.shape
    if value.dim() == 3 and value.shape[1] == 1:
        value = value.squeeze(1)
    if value.shape != (B, C):
        raise ValueError(
            f"{name}: expected shape (B={B}, C={C}) or (B={B}, 1, C={C}), found {tuple(value.shape)}"
        )
    return value


def _norm_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, scale, shift, *_ = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale, *output[1:])


def _norm_gradient(ctx: Any, grad: Tensor, *_rest: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_x, grad_scale, grad_shift = _norm_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_scale, grad_shift.to(ctx.shift_dtype), None, None


def _residual_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _residual_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (grad, *_residual_backward(grad, *ctx.saved_tensors))


def _wide(x: Tensor, *tensors: Tensor) -> torch.dtype:
    """That of sums."""
    return torch.float64 if any(t.dtype == torch.float64 for t in (x, *tensors)) else torch.float32


@op(
    "modulated_layer_norm(Tensor x, Tensor scale, Tensor shift, float eps, ScalarType out_dtype) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.modulated_layer_norm,
    triton=Launch(triton.modulated_layer_norm_triton, limits=triton.LIMITS),
    native=Native("_modulated_layer_norm", dtypes=UP_TO_FLOAT32),
    gradient=Gradient(_norm_save, _norm_gradient),
)
def _norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:2], dtype=_wide(x, scale, shift)) for _ in range(2))
    return x.new_empty(x.shape, dtype=out_dtype), mean, rstd


@op(
    "modulated_layer_norm_backward(Tensor grad, Tensor x, Tensor scale, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.modulated_layer_norm_backward,
    triton=Launch(triton.modulated_layer_norm_backward_triton, limits=triton.LIMITS),
    native=Native("_modulated_layer_norm_backward", dtypes=UP_TO_FLOAT32),
)
def _norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_shift = scale.new_empty(scale.shape, dtype=_wide(grad, x, scale))
    return x.new_empty(x.shape), scale.new_empty(scale.shape), grad_shift


@op(
    "gated_residual(Tensor x, Tensor y, Tensor gate) -> Tensor",
    reference=reference.gated_residual,
    triton=Launch(triton.gated_residual_triton, limits=triton.LIMITS),
    native=Native("_gated_residual", dtypes=UP_TO_FLOAT32),
    gradient=Gradient(_residual_save, _residual_gradient),
)
def _residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@op(
    "gated_residual_backward(Tensor grad, Tensor y, Tensor gate) -> (Tensor, Tensor)",
    reference=reference.gated_residual_backward,
    triton=Launch(triton.gated_residual_backward_triton, limits=triton.LIMITS),
    native=Native("_gated_residual_backward", dtypes=UP_TO_FLOAT32),
)
def _residual_backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


@op(
    "gated_residual_norm(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift, float eps, "
    "ScalarType out_dtype) -> (Tensor, Tensor)",
    reference=reference.gated_residual_norm,
    triton=Launch(triton.gated_residual_norm_triton, limits=triton.LIMITS),
    native=Native("_gated_residual_norm", dtypes=UP_TO_FLOAT32),
)
def _residual_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, out_dtype = rest
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype)
