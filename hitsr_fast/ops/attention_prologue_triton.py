"""Triton backend of `attention_prologue`: launches the kernel of kernels/attention_prologue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hitsr_fast import env
from hitsr_fast.ops.nearest_code_triton import MAX_GROUPS, available

__all__ = ["attention_prologue_triton", "available", "supports"]

MAX_HEAD_DIM = 1024  # a head lies in one program's registers
_VALUES = 512  # of q, of k and of v that a program takes, where a head is not larger
_PER_WARP = 256


def supports(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, start: int, *rest: Any) -> str | None:
    """Why a call with such arguments cannot run here, or None."""
    if qkv.device.type != "cuda" and not env.triton_interpret():
        return f"needs CUDA or HIP tensors, found {qkv.device.type}"
    bias = rest[0]
    if torch.float64 in (qkv.dtype, k_cache.dtype) or (bias is not None and bias.dtype == torch.float64):
        return "needs float16, bfloat16 or float32, found float64"
    B, _, NH, D = k_cache.shape
    if D > MAX_HEAD_DIM:
        return f"needs D of at most {MAX_HEAD_DIM}, found {D}"
    for name, size in (("B", B), ("NH", NH)):
        if size > MAX_GROUPS:
            return f"needs {name} of at most {MAX_GROUPS}, found {size}"
    return None


def constants(heads: int, head_dim: int) -> dict[str, Any]:
    """Block sizes and options for so many heads of such a size."""
    block = max(1 << (head_dim - 1).bit_length(), 2)
    together = min(max(_VALUES // block, 1), 1 << (heads - 1).bit_length())
    warps = max(together * block // _PER_WARP, 1)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    return {"NH": heads, "D": head_dim, "HEADS": together, "BLOCK": block, **options}


def attention_prologue_triton(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    bias: Tensor | None,
    q_scale: Tensor | None,
    rotary: Tensor | None,
) -> Tensor:
    """As `reference.attention_prologue`."""
    from hitsr_fast.kernels.attention_prologue import _attention_prologue_kernel

    B, L, _ = qkv.shape
    _, _, NH, D = k_cache.shape
    q = torch.empty((B, L, NH, D), dtype=qkv.dtype, device=qkv.device)
    if q.numel() > 0:
        block = constants(NH, D)
        with torch.cuda.device_of(qkv):
            _attention_prologue_kernel[(L, B, -(-NH // block["HEADS"]))](
                qkv,
                bias,
                q_scale,
                rotary,
                q,
                k_cache,
                v_cache,
                L,
                start,
                *qkv.stride(),
                *k_cache.stride(),
                *v_cache.stride(),
                *((0,) if bias is None else bias.stride()),
                *((0,) if q_scale is None else q_scale.stride()),
                *((0, 0, 0) if rotary is None else rotary.stride()),
                **block,
            )
    return q
