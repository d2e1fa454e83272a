"""Definition of scale-block attention (a token sees its own block and all earlier ones) and of its cached step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Bounds the score matrix of the backward pass to this many query rows.
_ROWS_PER_CHUNK = 256


def scale_block_attention(
    q: Tensor, k: Tensor, v: Tensor, block_lengths: Sequence[int], softmax_scale: float
) -> Tensor:
    """Attention without a mask: block i attends to the key prefix that ends with it.

    Args:
        q, k, v: floating `(B, T, NH, D)` of one dtype.
        block_lengths: lengths of the blocks in order, summing to T.
        softmax_scale: factor of the scores.

    Returns:
        `(B, T, NH, D)`, contiguous: per block `softmax(softmax_scale * q_i k[:end_i]^T) v[:end_i]`.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for start, end in _blocks(block_lengths):
        out[:, start:end] = _attend(q[:, start:end], k[:, :end], v[:, :end], softmax_scale)
    return out


def scale_block_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, block_lengths: Sequence[int], softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients `(B, T, NH, D)` in q, k and v; sums run in float32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    grad, query, key, value = (t.to(dtype).transpose(1, 2) for t in (grad, q, k, v))
    grad_q, grad_k, grad_v = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    for block_start, end in _blocks(block_lengths):
        for start in range(block_start, end, _ROWS_PER_CHUNK):
            rows = slice(start, min(start + _ROWS_PER_CHUNK, end))
            weights = (query[:, :, rows] @ key[:, :, :end].mT).mul_(softmax_scale).softmax(dim=-1)
            grad_v[:, :, :end] += weights.mT @ grad[:, :, rows]
            grad_weights = grad[:, :, rows] @ value[:, :, :end].mT
            mean = (weights * grad_weights).sum(dim=-1, keepdim=True)
            grad_scores = grad_weights.sub_(mean).mul_(weights).mul_(softmax_scale)
            grad_q[:, :, rows] = grad_scores @ key[:, :, :end]
            grad_k[:, :, :end] += grad_scores.mT @ query[:, :, rows]
    grad_q, grad_k, grad_v = (t.transpose(1, 2).to(q.dtype).contiguous() for t in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v


def cached_attention_step(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, start: int, softmax_scale: float
) -> Tensor:
    """Write k and v `(B, L, NH, D)` into the caches `(B, Tmax, NH, D)` at `start`; attend to all up to their end."""
    end = start + q.shape[1]
    k_cache[:, start:end] = k
    v_cache[:, start:end] = v
    return _attend(q, k_cache[:, :end], v_cache[:, :end], softmax_scale).contiguous()


def _blocks(block_lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, end) of each block on the token axis."""
    start = 0
    for length in block_lengths:
        yield start, start + length
        start += length


def _attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Attention of `(B, L, NH, D)` queries to `(B, M, NH, D)` keys, all of which they see."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=softmax_scale
    )
    return out.transpose(1, 2)
