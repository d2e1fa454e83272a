"""`scale_block_attention` and `cached_attention_step`: next-scale attention for training and for sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import hitsr_fast.reference.scale_block_attention as reference
from hitsr_fast.dispatch import Backend, register, register_autograd, register_no_gradient
from hitsr_fast.ops import scale_block_attention_cpu as cpu
from hitsr_fast.ops.validation import FLOATING, check_shape, check_tensor


def scale_block_attention(
    q: Tensor, k: Tensor, v: Tensor, block_lengths: Sequence[int], *, softmax_scale: float | None = None
) -> Tensor:
    """Attention in which a token sees its own block and all earlier ones, whole.

    For block i, which ends at token e_i: `out_i = softmax(softmax_scale * q_i k[:e_i]^T) v[:e_i]`.

    Args:
        q: float16, bfloat16, float32 or float64, `(B, T, NH, D)`. Any strides.
        k, v: of the same dtype and shape.
        block_lengths: lengths of the blocks in order, each at least 1, summing to T; block 0 is the prefix
            with the first scale.
        softmax_scale: factor of the scores; None means `1 / sqrt(D)`.

    Returns:
        `(B, T, NH, D)` in the dtype of q.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape, device or block length does not fit.

    Notes:
        No mask tensor exists on any backend. Softmax and sums run in float32 at least.
        Gradient: in q, k and v, by an op of its own.
        Backends: cpu (AMX, AVX-512, AVX2 or portable), reference.
        Source: the block-wise causal attention of VAR (arXiv 2404.02905), section 3.2.

    Example:
        >>> q = torch.zeros(1, 3, 1, 1)
        >>> v = torch.tensor([1.0, 3.0, 8.0]).view(1, 3, 1, 1)
        >>> scale_block_attention(q, q, v, [2, 1]).flatten()
        tensor([2., 2., 4.])
    """
    _check_qkv(q, k, v, "B T NH D")
    if not block_lengths or min(block_lengths) < 1 or sum(block_lengths) != q.shape[1]:
        raise ValueError(
            f"block_lengths: expected lengths of at least 1 with sum T={q.shape[1]}, "
            f"found {list(block_lengths)}"
        )
    out: Tensor
    out, _ = torch.ops.hitsr_fast.scale_block_attention(
        q, k, v, list(block_lengths), _scale(q, softmax_scale)
    )
    return out


def cached_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    *,
    softmax_scale: float | None = None,
) -> Tensor:
    """One block of `scale_block_attention` while sampling: write k and v into the caches, attend to all.

    With `end = start + L`: `k_cache[:, start:end] = k`, `v_cache[:, start:end] = v`, then
    `softmax(softmax_scale * q k_cache[:, :end]^T) v_cache[:, :end]`.

    Args:
        q: float16, bfloat16, float32 or float64, `(B, L, NH, D)`.
        k, v: of the same dtype and shape.
        k_cache, v_cache: of the same dtype, `(B, Tmax, NH, D)`; changed in place.
        start: number of tokens already in the caches.
        softmax_scale: factor of the scores; None means `1 / sqrt(D)`.

    Returns:
        `(B, L, NH, D)` in the dtype of q.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape or device does not fit, or the block does not fit into the caches.
        RuntimeError: an argument asks for a gradient; the step has none.

    Notes:
        Steps over all blocks give what `scale_block_attention` gives, up to rounding.
        Backends: cpu, reference.
        Source: VAR (arXiv 2404.02905), section 3.2.

    Example:
        >>> k_cache, v_cache = torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
        >>> q, v = torch.zeros(1, 2, 1, 1), torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
        >>> cached_attention_step(q, q, v, k_cache, v_cache, 0).flatten()
        tensor([2., 2.])
        >>> v_cache.flatten()
        tensor([1., 3., 0.])
    """
    _check_qkv(q, k, v, "B L NH D")
    B, L, NH, D = q.shape
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, cache, (q.dtype,), like=q)
        check_shape(name, cache, "B Tmax NH D", B=B, Tmax=k_cache.shape[1], NH=NH, D=D)
    if start < 0 or start + L > k_cache.shape[1]:
        raise ValueError(f"start: expected 0 to Tmax - L = {k_cache.shape[1] - L}, found {start}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, k_cache, v_cache)):
        raise RuntimeError("cached_attention_step: has no gradient; call it under torch.no_grad()")
    out: Tensor = torch.ops.hitsr_fast.cached_attention_step(
        q, k, v, k_cache, v_cache, start, _scale(q, softmax_scale)
    )
    return out


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, letters: str) -> None:
    check_tensor("q", q, FLOATING)
    check_shape("q", q, letters)
    known = dict(zip(letters.split(), q.shape, strict=True))
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor, (q.dtype,), like=q)
        check_shape(name, tensor, letters, **known)


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    return float(q.shape[-1] ** -0.5) if softmax_scale is None else softmax_scale


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, block_lengths: list[int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    B, T, NH, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, NH, T), dtype=torch.promote_types(q.dtype, torch.float32))


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _step_fake(q: Tensor, *_rest: Any) -> Tensor:
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
        Backend("cpu", cpu.scale_block_attention_cpu, cpu.supports),
        Backend("reference", reference.scale_block_attention),
    ],
    fake=_attention_fake,
)
register(
    "scale_block_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "int[] block_lengths, float softmax_scale) -> (Tensor, Tensor, Tensor)",
    backends=[
        Backend("cpu", cpu.scale_block_attention_backward_cpu, cpu.supports),
        Backend("reference", reference.scale_block_attention_backward),
    ],
    fake=_backward_fake,
)
register(
    "cached_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "SymInt start, float softmax_scale) -> Tensor",
    backends=[
        Backend("cpu", cpu.cached_attention_step_cpu, cpu.supports),
        Backend("reference", reference.cached_attention_step),
    ],
    fake=_step_fake,
)
register_autograd("scale_block_attention", _attention_backward, _attention_context)
register_no_gradient("scale_block_attention_backward", "second derivatives are not implemented")
