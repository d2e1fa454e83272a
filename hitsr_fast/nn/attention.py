"""Self-attention of VAR's blocks in training, on the `scale_block_attention` op."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hitsr_fast.nn.recompute import modulated_linear, qkv_attention

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

    undecayed = ("q_bias", "v_bias", "scale_mul_1H11")

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

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor], block_lengths: Sequence[int]) -> Tensor:
        """Attend within the `modulated_layer_norm` of x `(B, T, width)`; before the projection.

        `modulation` are the norm's scale and shift. See `CachedBody` for sampling.
        """
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = modulated_linear(x, modulation, self.mat_qkv.weight, bias)
        factor = score_factor(self.scale_mul_1H11) if self.l2_norm else None
        return qkv_attention(
            qkv, factor, heads=self.heads, block_lengths=block_lengths, softmax_scale=self.softmax_scale
        )
