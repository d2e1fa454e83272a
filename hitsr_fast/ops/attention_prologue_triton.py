"""Triton backend of `attention_prologue`: launches the kernel of kernels/attention_prologue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hitsr_fast.backends import MAX_GRID, Limit, cdiv

# A head lies in one program's registers.
LIMITS = (
    Limit("D", 3, 1024, "k_cache"),
    Limit("B", 0, MAX_GRID, "k_cache"),
    Limit("NH", 2, MAX_GRID, "k_cache"),
)
_VALUES = 512  # of q, of k and of v that a program takes, where a head is not larger
_PER_WARP = 256


def constants(heads: int, head_dim: int) -> dict[str, Any]:
    """Block sizes and options for so many heads of such a size."""
    block = max(1 << (head_dim - 1).bit_length(), 2)
    together = min(max(_VALUES // block, 1), 1 << (heads - 1).bit_length())
    warps = max(together * block // _PER_WARP, 1)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    return {"NH": heads, "D": head_dim, "HEADS": together, "BLOCK": block, **options}


def attention_prologue_triton(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, start: int, *given: Tensor | None
) -> Tensor:
    """As `reference.attention_prologue`; `given` are bias, q_scale and rotary, each perhaps None."""
    from hitsr_fast.kernels.attention_prologue import _attention_prologue_kernel

    B, L, _ = qkv.shape
    _, _, NH, D = k_cache.shape
    q = torch.empty((B, L, NH, D), dtype=qkv.dtype, device=qkv.device)
    if q.numel() > 0:
        block = constants(NH, D)
        _attention_prologue_kernel[(L, B, cdiv(NH, block["HEADS"]))](
            qkv, *given, q, k_cache, v_cache, L, start, qkv.stride(), k_cache.stride(), v_cache.stride(),
            *(None if tensor is None else tensor.stride() for tensor in given), **block,
        )  # fmt: skip
    return q
