"""Attention of VAR's blocks on the `scale_block_attention` op, with its preallocated KV cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.ops import cached_attention, scale_block_attention


class KVCache:
    """Keys and values of one layer, `(B, T, NH, D)`, written in place; the first `length` rows are valid."""

    def __init__(
        self, batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ):
        self.k = torch.zeros(batch, tokens, heads, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.length = 0


class SelfAttention(nn.Module):
    """Block-causal multi-head self-attention (VAR): qkv without a key bias, optionally l2-normalised q and k.

    Args:
        width: Width of a token.
        heads: Number of heads.
        l2_norm: Normalise q and k per head and multiply q by a learned factor of at most 100.
    """

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int, l2_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.l2_norm = l2_norm
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width), persistent=False)
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, block_lengths: Sequence[int], cache: KVCache | None = None) -> Tensor:
        """Attend within `x` `(B, T, width)` or, with a cache, from the new rows `x` to all rows so far."""
        b, t, width = x.shape
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        q, k, v = F.linear(x, self.mat_qkv.weight, bias).view(b, t, 3, self.heads, -1).unbind(2)
        softmax_scale: float = 0.25 / math.sqrt(width // self.heads)
        if self.l2_norm:
            # The norm is taken in float32: in half it overflows and underflows.
            factor = self.scale_mul_1H11.clamp_max(math.log(100.0)).exp().view(1, 1, -1, 1)
            q = (F.normalize(q.float(), dim=-1) * factor).to(v.dtype)
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
            softmax_scale = 1.0
        if cache is None:
            out = scale_block_attention(q, k, v, block_lengths=block_lengths, softmax_scale=softmax_scale)
        else:
            rows = slice(cache.length, cache.length + t)
            cache.k[:, rows], cache.v[:, rows] = k, v
            cache.length += t
            q = q.to(cache.k.dtype)
            out = cached_attention(q, cache.k, cache.v, cache.length, softmax_scale=softmax_scale)
        projected: Tensor = self.proj(out.reshape(b, t, width))
        return projected
