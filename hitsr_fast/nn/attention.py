"""Self-attention of VAR's blocks in training, on the `scale_block_attention` op."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.ops.scale_block_attention import scale_block_attention

_MAX_LOG_SCALE = math.log(100.0)


def score_factor(log_scale: Tensor) -> Tensor:
    """VAR's factor of each head's normalised scores from its parameter `(1, NH, 1, 1)`: float32 `(NH,)`."""
    return log_scale.float().clamp_max(_MAX_LOG_SCALE).exp().flatten()


class SelfAttention(nn.Module):
    """Block-causal multi-head self-attention (VAR): qkv without a key bias, optionally l2-normalised q and k.

    Args:
        width: Width of a token.
        heads: Number of heads.
        l2_norm: Normalise q and k per head and multiply q by a learned factor of at most 100.
    """

    def __init__(self, width: int, heads: int, l2_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.l2_norm = l2_norm
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(width, width)

    @property
    def softmax_scale(self) -> float:
        """Factor of the scores."""
        return 1.0 if self.l2_norm else 0.25 / math.sqrt(self.proj.in_features // self.heads)

    def forward(self, x: Tensor, block_lengths: Sequence[int]) -> Tensor:
        """Attend within `x` `(B, T, width)`; see `CachedBody` for sampling."""
        b, t, width = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.mat_qkv.weight, bias).view(b, t, 3, self.heads, -1).unbind(2)
        if self.l2_norm:
            # The norm is taken in float32 at least: in half it overflows and underflows.
            wide = torch.promote_types(q.dtype, torch.float32)
            factor = score_factor(self.scale_mul_1H11)[:, None]
            q = (F.normalize(q.to(wide), dim=-1) * factor).to(v.dtype)
            k = F.normalize(k.to(wide), dim=-1).to(v.dtype)
        out = scale_block_attention(q, k, v, block_lengths=block_lengths, softmax_scale=self.softmax_scale)
        projected: Tensor = self.proj(out.reshape(b, t, width))
        return projected
