"""`scale_block_attention` and `cached_attention`: next-scale attention for training and for sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

import hitsr_fast.reference.scale_block_attention as reference
from hitsr_fast.checks import (
    FLOATING,
    INTEGER,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
)
from hitsr_fast.dispatch import Backend, register, register_autograd, register_no_gradient
from hitsr_fast.ops import scale_block_attention_cpu as cpu
from hitsr_fast.ops import scale_block_attention_flash as flash
from hitsr_fast.ops import scale_block_attention_triton as triton


@overload
def scale_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_lengths: Sequence[int],
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def scale_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_lengths: Sequence[int],
    softmax_scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def scale_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_lengths: Sequence[int],
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which a token sees its own block and all earlier ones, whole.

    For block i, which ends at token e_i: `out_i = softmax(softmax_scale * q_i k[:e_i]^T) v[:e_i]`.

    Args:
        q: float16, bfloat16, float32 or float64, `(B, T, NH, D)`. Any strides.
        k, v: of the same dtype and shape.
        block_lengths: lengths of the blocks in order, each at least 1, summing to T; block 0 is the prefix
            with the first scale.
        softmax_scale: factor of the scores; None means `1 / sqrt(D)`.
        return_lse: return lse too.

    Returns:
        out: `(B, T, NH, D)` in the dtype of q.
        lse: where asked for, `(B, NH, T)`, the logarithm of each softmax's denominator, float32 (float64 for
            float64). No gradient flows through it.

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: a shape, device or block length does not fit, or D is 0 and no `softmax_scale` given.

    Notes:
        No mask tensor exists on any backend. Softmax and sums run in float32 at least.
        Gradient: in q, k and v, by an op of its own.
        Backends: triton, flash_attn, cpu (AMX, AVX-512, AVX2 or portable), reference.
        Source: the block-wise causal attention of VAR (arXiv 2404.02905), section 3.2.

    Example:
        >>> q = torch.zeros(1, 3, 1, 1)
        >>> v = torch.tensor([1.0, 3.0, 8.0]).view(1, 3, 1, 1)
        >>> scale_block_attention(q, q, v, block_lengths=[2, 1]).flatten()
        tensor([2., 2., 4.])
        >>> scale_block_attention(q, q, v, block_lengths=[2, 1], return_lse=True)[1].exp().flatten()
        tensor([2., 2., 3.])
    """
    check_tensor("q", q, FLOATING)
    check_shape("q", q, "B T NH D")
    B, T, NH, D = q.shape
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor, (q.dtype,), like=q)
        check_shape(name, tensor, "B T NH D", B=B, T=T, NH=NH, D=D)
    lengths, factor = _lengths(block_lengths, T), _scale(q, softmax_scale)
    out: Tensor
    lse: Tensor
    out, lse = torch.ops.hitsr_fast.scale_block_attention(q, k, v, lengths, factor)
    return (out, lse.detach()) if return_lse else out


def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, *, softmax_scale: float | None = None
) -> Tensor:
    """One block of `scale_block_attention` while sampling: its queries attend to the rows of a cache in use.

    `softmax(softmax_scale * q k_cache[:, :length]^T) v_cache[:, :length]`. The rows of the block itself are
    in the caches already.

    Args:
        q: float16, bfloat16, float32 or float64, `(B, L, NH, D)`. Any strides.
        k_cache, v_cache: of the same dtype, `(B, Tmax, NH, D)`. Any strides.
        length: number of rows that are valid, 1 to Tmax; the others are not read.
        softmax_scale: factor of the scores; None means `1 / sqrt(D)`.

    Returns:
        `(B, L, NH, D)` in the dtype of q.

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: a shape or device does not fit, `length` is out of range, or D is 0 and no `softmax_scale`
            given.
        RuntimeError: an argument asks for a gradient; the op has none.

    Notes:
        Calls block by block give what `scale_block_attention` gives, up to rounding.
        Backends: triton, flash_attn, cpu, reference.
        Source: VAR (arXiv 2404.02905), section 3.2.

    Example:
        >>> k_cache = torch.zeros(1, 3, 1, 1)
        >>> v_cache = torch.tensor([1.0, 3.0, torch.nan]).view(1, 3, 1, 1)
        >>> cached_attention(torch.zeros(1, 1, 1, 1), k_cache, v_cache, 2).flatten()
        tensor([2.])
    """
    check_tensor("q", q, FLOATING)
    check_shape("q", q, "B L NH D")
    B, _, NH, D = q.shape
    check_tensor("k_cache", k_cache, (q.dtype,), like=q)
    check_shape("k_cache", k_cache, "B Tmax NH D", B=B, NH=NH, D=D)
    Tmax = k_cache.shape[1]
    check_tensor("v_cache", v_cache, (q.dtype,), like=q)
    check_shape("v_cache", v_cache, "B Tmax NH D", B=B, Tmax=Tmax, NH=NH, D=D)
    check_integer("length", length, 1, Tmax, "Tmax")
    factor = _scale(q, softmax_scale)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k_cache, v_cache)):
        raise RuntimeError("cached_attention: has no gradient; call it under torch.no_grad()")
    out: Tensor = torch.ops.hitsr_fast.cached_attention(q, k_cache, v_cache, length, factor)
    return out


def _lengths(block_lengths: Sequence[int], T: int) -> list[int]:
    """The lengths of the blocks, which any iterable may give."""
    expected = f"block_lengths: expected integers of at least 1 with sum T={T}"
    try:
        lengths = list(block_lengths)
    except TypeError:
        raise TypeError(f"{expected}, found {block_lengths!r}") from None
    if not all(isinstance(length, INTEGER) for length in lengths):
        raise TypeError(f"{expected}, found {lengths}")
    if not lengths or min(lengths) < 1 or sum(lengths) != T:
        raise ValueError(f"{expected}, found {lengths}")
    return lengths


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    """The factor of the scores, checked."""
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale)
        return softmax_scale
    if q.shape[-1] == 0:
        raise ValueError("softmax_scale: expected a number where D is 0, found None")
    return float(q.shape[-1] ** -0.5)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, block_lengths: list[int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    B, T, NH, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, NH, T), dtype=torch.promote_types(q.dtype, torch.float32))


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _cached_fake(q: Tensor, *_rest: Any) -> Tensor:
    return q.new_empty(q.shape)


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.block_lengths, ctx.softmax_scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _attention_backward(ctx: Any, grad: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = torch.ops.hitsr_fast.scale_block_attention_backward(
        grad, *ctx.saved_tensors, ctx.block_lengths, ctx.softmax_scale
    )
    return (*grads, None, None)


register(
    "scale_block_attention(Tensor q, Tensor k, Tensor v, int[] block_lengths, float softmax_scale) "
    "-> (Tensor, Tensor)",
    backends=[
        Backend("triton", triton.scale_block_attention_triton, triton.supports, triton.available),
        Backend("flash_attn", flash.scale_block_attention_flash, flash.supports, flash.available),
        Backend("cpu", cpu.scale_block_attention_cpu, cpu.supports),
        Backend("reference", reference.scale_block_attention),
    ],
    fake=_attention_fake,
)
register(
    "scale_block_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "int[] block_lengths, float softmax_scale) -> (Tensor, Tensor, Tensor)",
    backends=[
        Backend("triton", triton.scale_block_attention_backward_triton, triton.supports, triton.available),
        Backend("flash_attn", flash.scale_block_attention_backward_flash, flash.supports, flash.available),
        Backend("cpu", cpu.scale_block_attention_backward_cpu, cpu.supports),
        Backend("reference", reference.scale_block_attention_backward),
    ],
    fake=_backward_fake,
)
register(
    "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, SymInt length, float softmax_scale) "
    "-> Tensor",
    backends=[
        Backend("triton", triton.cached_attention_triton, triton.supports, triton.available),
        Backend("flash_attn", flash.cached_attention_flash, flash.supports, flash.available),
        Backend("cpu", cpu.cached_attention_cpu, cpu.supports),
        Backend("reference", reference.cached_attention),
    ],
    fake=_cached_fake,
)
register_autograd("scale_block_attention", _attention_backward, _attention_context)
register_no_gradient("scale_block_attention_backward", "second derivatives are not implemented")
register_no_gradient("cached_attention", "attention to a cache has no gradient")
