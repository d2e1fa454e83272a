"""Definition of scale-block attention: a token sees its own and all earlier blocks, some maybe in a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Bounds the score matrix to this many query rows.
_ROWS_PER_CHUNK = 256


def scale_block_attention(
    q: Tensor, k: Tensor, v: Tensor, block_lengths: Sequence[int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention without a mask: block i attends to the key prefix that ends with it.

    Arguments and results, out and lse, are those of `ops.scale_block_attention`; contiguous.
    """
    query, key, value = _heads_first(q, k, v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:3], dtype=query.dtype, device=q.device)
    for rows, end in _row_chunks(block_lengths):
        scores = (query[:, :, rows] @ key[:, :, :end].mT).mul_(softmax_scale)
        lse[:, :, rows] = scores.logsumexp(dim=-1)
        weights = scores.sub_(lse[:, :, rows, None]).exp_()
        out[:, rows] = (weights @ value[:, :, :end]).transpose(1, 2)
    return out, lse


def scale_block_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_lengths: Sequence[int],
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients `(B, T, NH, D)` in q, k and v from the gradient of `out`; contiguous.

    With weights P and G = grad: dV = P^T G, dS = P (G V^T - rowsum(G out)), dQ = dS K, dK = dS^T Q.
    """
    query, key, value, grad, out = _heads_first(q, k, v, grad, out)
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    grad_q, grad_k, grad_v = grads
    for rows, end in _row_chunks(block_lengths):
        scores = (query[:, :, rows] @ key[:, :, :end].mT).mul_(softmax_scale)
        weights = scores.sub_(lse[:, :, rows, None]).exp_()
        grad_v[:, :, :end] += weights.mT @ grad[:, :, rows]
        grad_scores = grad[:, :, rows] @ value[:, :, :end].mT
        grad_scores -= (grad[:, :, rows] * out[:, :, rows]).sum(dim=-1, keepdim=True)
        grad_scores *= weights.mul_(softmax_scale)
        grad_q[:, :, rows] = grad_scores @ key[:, :, :end]
        grad_k[:, :, :end] += grad_scores.mT @ query[:, :, rows]
    grad_q, grad_k, grad_v = (t.transpose(1, 2).contiguous().to(q.dtype) for t in grads)
    return grad_q, grad_k, grad_v


def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, softmax_scale: float
) -> Tensor:
    """Attention of q `(B, L, NH, D)` to the first `length` rows of the caches `(B, Tmax, NH, D)`."""
    query, key, value = _heads_first(q, k_cache[:, :length], v_cache[:, :length])
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for start in range(0, q.shape[1], _ROWS_PER_CHUNK):
        rows = slice(start, start + _ROWS_PER_CHUNK)
        weights = (query[:, :, rows] @ key.mT).mul_(softmax_scale).softmax(dim=-1)
        out[:, rows] = (weights @ value).transpose(1, 2)
    return out


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """`(B, T, NH, D)` -> `(B, NH, T, D)`, in float32 where the dtype is a 16-bit one."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [t.transpose(1, 2).to(dtype) for t in tensors]


def _row_chunks(block_lengths: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Query rows, at most `_ROWS_PER_CHUNK` of one block at a time, with the end of the keys they see."""
    block_start = 0
    for length in block_lengths:
        end = block_start + length
        for start in range(block_start, end, _ROWS_PER_CHUNK):
            yield slice(start, min(start + _ROWS_PER_CHUNK, end)), end
        block_start = end
