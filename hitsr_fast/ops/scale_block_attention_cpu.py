"""CPU backend of scale-block attention.

Forward, and backward in float32: csrc/cpu/scale_block_attention*.cpp, on the best instruction set. The rest,
and installations without the extension: PyTorch's own flash kernel, once per block on the visible keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hitsr_fast import env, extension
from hitsr_fast.ops.nearest_code_cpu import chosen_isa
from hitsr_fast.reference.scale_block_attention import scale_block_attention as reference

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def supports(q: Tensor, *_rest: Any) -> str | None:
    """Why a call with such tensors cannot run here, or None."""
    return None if q.device.type == "cpu" else f"needs CPU tensors, found {q.device.type}"


def compiled(dtype: torch.dtype) -> bool:
    """Whether the extension computes the forward; if it is missing, a forced instruction set must raise."""
    return dtype != torch.float64 and (extension.unavailable() is None or env.cpu_isa() is not None)


def _readable(*tensors: Tensor) -> list[Tensor]:
    """The tensors with their last axis dense: the kernel reads it as if it were, and does not check."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def scale_block_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, block_lengths: Sequence[int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """As `reference.scale_block_attention`."""
    if compiled(q.dtype):
        return _attend(q, k, v, block_lengths, softmax_scale)
    if q.numel() == 0:
        return reference(q, k, v, block_lengths, softmax_scale)
    q, k, v = _readable(q, k, v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.promote_types(q.dtype, torch.float32))
    for length, end in zip(block_lengths, accumulate(block_lengths), strict=True):
        rows = slice(end - length, end)
        query, key, value = (t.transpose(1, 2) for t in (q[:, rows], k[:, :end], v[:, :end]))
        block_out, lse[:, :, rows] = _forward(query, key, value, scale=softmax_scale)
        out[:, rows] = block_out.transpose(1, 2)
    return out, lse


def scale_block_attention_backward_cpu(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_lengths: Sequence[int],
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.scale_block_attention_backward`; sums over blocks run in float32 at least."""
    if q.dtype == torch.float32 and compiled(q.dtype):
        grads: tuple[Tensor, Tensor, Tensor] = torch.ops.hitsr_fast._scale_block_attention_backward(
            grad, q, k, v, out, lse, block_lengths, softmax_scale, chosen_isa()
        )
        return grads
    if q.numel() == 0:  # PyTorch's kernel divides by the number of heads
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad, q, k, v, out = _readable(grad, q, k, v, out)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (
        torch.zeros_like(t, dtype=lse.dtype, memory_format=torch.contiguous_format) for t in (k, v)
    )
    for length, end in zip(block_lengths, accumulate(block_lengths), strict=True):
        rows = slice(end - length, end)
        block = (t.transpose(1, 2) for t in (grad[:, rows], q[:, rows], k[:, :end], v[:, :end], out[:, rows]))
        block_grads = _backward(*block, lse[:, :, rows], 0.0, False, scale=softmax_scale)
        block_q, block_k, block_v = (t.transpose(1, 2) for t in block_grads)
        grad_q[:, rows] = block_q
        grad_k[:, :end] += block_k
        grad_v[:, :end] += block_v
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def cached_attention_cpu(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, softmax_scale: float
) -> Tensor:
    """As `reference.cached_attention`."""
    keys, values = k_cache[:, :length], v_cache[:, :length]
    if compiled(q.dtype):
        return _attend(q, keys, values, [q.shape[1]], softmax_scale)[0]
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    query, key, value = (t.transpose(1, 2) for t in _readable(q, keys, values))
    out: Tensor = _forward(query, key, value, scale=softmax_scale)[0]
    return out.transpose(1, 2).contiguous()


def _attend(
    q: Tensor, k: Tensor, v: Tensor, block_lengths: Sequence[int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Output and lse of the last tokens, which are `q`, of those in `k` and `v`."""
    out: tuple[Tensor, Tensor] = torch.ops.hitsr_fast._scale_block_attention(
        q, k, v, block_lengths, softmax_scale, chosen_isa()
    )
    return out
