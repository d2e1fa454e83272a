"""CPU backend of `attention_prologue`: csrc/cpu/attention_prologue*.cpp, on the best instruction set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hitsr_fast.ops.nearest_code_cpu import available, chosen_isa

__all__ = ["attention_prologue_cpu", "available", "supports"]


def supports(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, start: int, *rest: Any) -> str | None:
    """Why a call with such arguments cannot run here, or None."""
    if not qkv.is_cpu:
        return f"needs CPU tensors, found {qkv.device.type}"
    bias = rest[0]
    if torch.float64 in (qkv.dtype, k_cache.dtype) or (bias is not None and bias.dtype == torch.float64):
        return "needs float16, bfloat16 or float32, found float64"
    for cache in (k_cache, v_cache):
        if cache.shape[3] > 1 and cache.stride(3) != 1:
            return f"needs caches with a stride of 1 over D, found {cache.stride(3)}"
    return None


def attention_prologue_cpu(*args: Any) -> Tensor:
    """As `reference.attention_prologue`."""
    q: Tensor = torch.ops.hitsr_fast._attention_prologue(*args, chosen_isa())
    return q
