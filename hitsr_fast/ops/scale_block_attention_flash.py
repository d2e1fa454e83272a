"""FlashAttention-3 as a backend of `scale_block_attention` and `cached_attention`, where it is installed.

It knows no masks of blocks, and needs none: its call for caches takes queries in segments of any length, and
each segment may look at the same cache up to an end of its own. A block is a segment, the keys are the cache.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

_MODULE = "flash_attn_interface"
_MAX_HEAD_DIM = 256


def available() -> str | None:
    """Why nothing can run on this machine, or None."""
    if importlib.util.find_spec(_MODULE) is None:
        return f"FlashAttention-3 ({_MODULE}) is not installed"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "no CUDA device"
    return None


def supports(*args: Any) -> str | None:
    """Why a call with such arguments, of which the first is `(B, T, NH, D)`, cannot run here, or None."""
    values = args[0]
    if values.device.type != "cuda":
        return f"needs CUDA tensors, found {values.device.type}"
    if values.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, found {str(values.dtype).removeprefix('torch.')}"
    D = values.shape[3]
    if D % 8 or D > _MAX_HEAD_DIM:
        return f"needs D of a multiple of 8 up to {_MAX_HEAD_DIM}, found {D}"
    if values.numel() == 0:
        return f"needs tensors that hold values, found {tuple(values.shape)}"
    return None


@functools.lru_cache(maxsize=64)
def segments(block_lengths: tuple[int, ...], B: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of B images as segments of queries, image by image; int32.

    Returns:
        Where each begins among the B T queries, and the end of the last; how many keys it sees; its image.
    """
    ends = list(accumulate(block_lengths))
    starts = [image * ends[-1] + start for image in range(B) for start in (0, *ends[:-1])]
    table = ([*starts, B * ends[-1]], ends * B, [image for image in range(B) for _ in ends])
    begins, visible, images = (torch.tensor(row, dtype=torch.int32, device=device) for row in table)
    return begins, visible, images


def scale_block_attention_flash(
    q: Tensor, k: Tensor, v: Tensor, block_lengths: Sequence[int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """As `reference.scale_block_attention`, in one launch."""
    B, T, NH, D = q.shape
    begins, visible, images = segments(tuple(block_lengths), B, q.device)
    out, lse, *_ = importlib.import_module(_MODULE).flash_attn_with_kvcache(
        q.reshape(B * T, NH, D),
        _readable(k),
        _readable(v),
        cu_seqlens_q=begins,
        max_seqlen_q=max(block_lengths),
        cache_seqlens=visible,
        cache_batch_idx=images,
        softmax_scale=softmax_scale,
        causal=False,
        num_splits=1,
        return_softmax_lse=True,
    )
    return out.view(q.shape), lse.view(NH, B, T).transpose(0, 1).contiguous()


def scale_block_attention_backward_flash(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_lengths: Sequence[int],
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.scale_block_attention_backward`: a call for each block, whose sums run in float32."""
    run = importlib.import_module(_MODULE)._flash_attn_backward
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_k, grad_v = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (k, v))
    for length, end in zip(block_lengths, accumulate(block_lengths), strict=True):
        rows = slice(end - length, end)
        given, query, key, value, result = (
            _readable(t) for t in (grad[:, rows], q[:, rows], k[:, :end], v[:, :end], out[:, rows])
        )
        block_q, block_k, block_v = (
            torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)
        )
        # By position up to the mask, for its name is not the same in all versions.
        run(
            given,
            query,
            key,
            value,
            result,
            lse[:, :, rows].contiguous(),
            *(None,) * 6,  # of segments and of parts in use
            block_q,
            block_k,
            block_v,
            softmax_scale,
            False,
            deterministic=True,
        )
        grad_q[:, rows] = block_q
        grad_k[:, :end] += block_k
        grad_v[:, :end] += block_v
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def cached_attention_flash(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, softmax_scale: float
) -> Tensor:
    """As `reference.cached_attention`."""
    out: Tensor = importlib.import_module(_MODULE).flash_attn_with_kvcache(
        q,
        _readable(k_cache),
        _readable(v_cache),
        cache_seqlens=length,
        softmax_scale=softmax_scale,
        causal=False,
    )
    return out


def _readable(tensor: Tensor) -> Tensor:
    """The tensor with its last axis dense."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
