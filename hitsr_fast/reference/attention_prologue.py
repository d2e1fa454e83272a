"""Definition of what lies between an attention's qkv product and its scores: bias, norm, rotary, cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_prologue(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    bias: Tensor | None,
    q_scale: Tensor | None,
    rotary: Tensor | None,
) -> Tensor:
    """Queries of a block of tokens, contiguous; its keys and values go into the caches.

    Arguments and result are those of `ops.attention_prologue`.
    """
    values = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    if bias is not None:
        values = values + bias.to(values.dtype)
    q, k, v = values.unflatten(2, (3, *k_cache.shape[2:])).unbind(2)
    if q_scale is not None:
        q, k = F.normalize(q, dim=-1) * q_scale[:, None], F.normalize(k, dim=-1)
    if rotary is not None:
        q, k = _turn(q, rotary), _turn(k, rotary)
    end = start + qkv.shape[1]
    k_cache[:, start:end] = k
    v_cache[:, start:end] = v
    out: Tensor = q.to(qkv.dtype, copy=True, memory_format=torch.contiguous_format)
    return out


def _turn(x: Tensor, rotary: Tensor) -> Tensor:
    """x `(B, L, NH, D)` as pairs of neighbours, each turned by its angle."""
    even, odd, cosine, sine = x[..., 0::2], x[..., 1::2], *rotary[:, None].unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)
