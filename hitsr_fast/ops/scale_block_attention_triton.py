"""Triton backend of `scale_block_attention`, `cached_attention`: launches kernels/scale_block_attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hitsr_fast import env
from hitsr_fast.backends import MAX_GRID, Limit, cdiv

LIMITS = (Limit("D", 3, 128), Limit("B", 0, MAX_GRID), Limit("NH", 2, MAX_GRID))

# Whose products are right there; of bfloat16 the interpreter takes the bits for integers.
_INTERPRETED = (torch.float16, torch.float32)
_LOG2E = math.log2(math.e)
_ROWS = 64  # of which a program of the small kernels takes care
_COMBINED = 16  # rows that a program combines
_ENOUGH = 128  # programs: about as many as a large GPU has multiprocessors
_FEW = 64  # programs: of more, sharing the keys out spares less time than the kernel that combines them takes
_LEAST_SHARE = 128  # keys that are worth a program, whose part of the result is written and read once more

_KERNELS = ("forward", "dkdv", "dq", "decode")

# Queries and keys of a tile, warps and stages, for each kernel, and where the compiler aims too low, the most
# registers of a thread; by chip, by whether values are float32 and whether D is above 64. Of the sizes that
# spill nothing these take about the fewest instructions a score.
_TILES: dict[str, dict[tuple[bool, bool], tuple[tuple[int, ...], ...]]] = {
    # And all others of NVIDIA's: their products read registers, not shared memory.
    "ampere": {
        (False, False): ((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)),
        (False, True): ((128, 32, 8, 2), (64, 64, 8, 1), (64, 64, 8, 2), (32, 64, 4, 2)),
        (True, False): ((32, 32, 4, 1), (32, 16, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
        (True, True): ((16, 32, 4, 1), (16, 16, 8, 1), (16, 32, 8, 1), (16, 32, 4, 1)),
    },
    # Two programs of four warps share a multiprocessor: one's exponentials run beside the other's products.
    "hopper": {
        (False, False): ((128, 64, 4, 3), (64, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 3)),
        (False, True): ((128, 64, 8, 2), (32, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)),
        (True, False): ((128, 32, 8, 2), (32, 128, 8, 1), (128, 32, 8, 1), (64, 32, 4, 1)),
        (True, True): ((16, 32, 4, 1), (16, 16, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
    },
    "blackwell": {
        (False, False): ((128, 128, 8, 2), (64, 128, 4, 2), (128, 64, 8, 2), (64, 64, 4, 2)),
        (False, True): ((128, 64, 8, 2), (64, 128, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2)),
        (True, False): ((64, 32, 8, 1), (32, 64, 8, 1), (64, 32, 8, 1), (32, 32, 4, 1)),
        (True, True): ((16, 32, 4, 1), (16, 16, 4, 1), (16, 16, 8, 1), (16, 32, 4, 1)),
    },
    # Of GeForce and RTX PRO: products as those of Ampere, less shared memory than Blackwell's others.
    "blackwell_rtx": {
        (False, False): ((128, 64, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2, 255)),
        (False, True): ((128, 32, 8, 2), (64, 64, 8, 1), (64, 64, 8, 2), (32, 64, 4, 2)),
        (True, False): ((32, 32, 4, 1, 255), (32, 16, 4, 1), (16, 32, 4, 1), (16, 32, 4, 1)),
        (True, True): ((16, 32, 4, 1), (16, 16, 8, 1), (16, 16, 8, 2), (16, 32, 4, 1)),
    },
    "cdna": {
        (False, False): ((128, 64, 4, 2), (16, 128, 4, 1), (128, 64, 4, 1), (64, 32, 4, 1)),
        (False, True): ((128, 32, 4, 1), (16, 128, 4, 1), (128, 32, 4, 1), (64, 32, 4, 1)),
        (True, False): ((128, 32, 4, 1), (16, 128, 4, 1), (128, 32, 4, 1), (64, 32, 4, 1)),
        (True, True): ((64, 32, 4, 1), (16, 64, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1)),
    },
    # Small ones, so that short inputs have whole tiles, too.
    "interpreter": {
        (exact, wide): ((32, 16, 4, 1), (16, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1))
        for exact in (False, True)
        for wide in (False, True)
    },
}


def unsupported(*args: Any) -> str | None:
    """Why it cannot run a call with such arguments, of which the last is `softmax_scale`, or None."""
    if env.triton_interpret() and args[0].dtype not in _INTERPRETED:
        return "needs a GPU for bfloat16, found Triton's interpreter"
    return None if args[-1] > 0 else f"needs a softmax_scale above 0, found {args[-1]}"


@functools.lru_cache(maxsize=64)
def block_table(block_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 `(2, T)`: of each token, where its block begins and where it ends.

    The rows of a tile read their own range from it, and from those of the first and last row follows which
    tiles are whole: for tiles of any size.
    """
    lengths = torch.tensor(block_lengths)
    ends = torch.tensor(list(accumulate(block_lengths)))
    edges = torch.stack([ends - lengths, ends]).int()
    return edges.repeat_interleave(lengths, dim=1, output_size=sum(block_lengths)).to(device)


def family(backend: str, arch: int | str) -> str:
    """The key of `_TILES` for a target of Triton's."""
    if backend != "cuda":
        return "cdna"
    return {9: "hopper", 10: "blackwell", 12: "blackwell_rtx"}.get(int(arch) // 10, "ampere")


def _present_family() -> str:
    if env.triton_interpret():
        return "interpreter"
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return family(target.backend, target.arch)


def constants(kernel: str, dtype: torch.dtype, D: int, chip: str | None = None) -> dict[str, Any]:
    """Block sizes and options of a kernel: "forward", "dkdv", "dq" or "decode".

    Args:
        chip: a `family`; None means that of the GPU at hand.
    """
    chip = chip or _present_family()
    padded = max(1 << (D - 1).bit_length(), 16)
    exact = dtype == torch.float32
    queries, keys, warps, stages, *most = _TILES[chip][exact, padded > 64][_KERNELS.index(kernel)]
    # Three products of tf32 give the digits of float32; AMD's tensor cores take float32 as it is.
    precision = "tf32x3" if exact and chip not in ("cdna", "interpreter") else "ieee"
    sizes = {"D": D, "DP": padded, "BLOCK_M": queries, "BLOCK_N": keys, "PRECISION": precision}
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return sizes | options | ({"maxnreg": most[0]} if most else {})


def decode_plan(
    B: int, L: int, NH: int, D: int, length: int, dtype: torch.dtype
) -> tuple[int, dict[str, Any]]:
    """How many keys a program of `cached_attention` takes, and its constants; from shapes alone.

    Few queries come in tiles of their own size. Where those give too few programs to fill a GPU, the keys are
    shared out as well.
    """
    chosen = constants("forward", dtype, D)
    few = constants("decode", dtype, D)
    if few["BLOCK_M"] >= L or cdiv(L, chosen["BLOCK_M"]) * NH * B < _ENOUGH:
        chosen = few | {"BLOCK_M": min(max(1 << (L - 1).bit_length(), 16), few["BLOCK_M"])}
    programs = cdiv(L, chosen["BLOCK_M"]) * NH * B
    splits = min(2 * _ENOUGH // programs, cdiv(length, _LEAST_SHARE)) if programs < _FEW else 1
    return cdiv(cdiv(length, splits), chosen["BLOCK_N"]) * chosen["BLOCK_N"], chosen


def scale_block_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, block_lengths: Sequence[int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """As `reference.scale_block_attention`."""
    from hitsr_fast.kernels.scale_block_attention import _scale_block_attention_fwd_kernel

    B, T, NH, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, NH, T, dtype=torch.float32, device=q.device)
    chosen = constants("forward", q.dtype, D)
    if out.numel() > 0:
        _scale_block_attention_fwd_kernel[(cdiv(T, chosen["BLOCK_M"]), NH, B)](
            q, k, v, block_table(tuple(block_lengths), q.device), out, lse, T, NH, softmax_scale * _LOG2E,
            q.stride(), k.stride(), v.stride(), **chosen,
        )  # fmt: skip
    return out, lse


def scale_block_attention_backward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.scale_block_attention_backward`."""
    from hitsr_fast.kernels.scale_block_attention import (
        _scale_block_attention_delta_kernel,
        _scale_block_attention_dkdv_kernel,
        _scale_block_attention_dq_kernel,
    )

    grad, q, k, v, out, lse, block_lengths, softmax_scale = args
    B, T, NH, D = q.shape
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    grad_q, grad_k, grad_v = grads
    delta = torch.empty(B, NH, T, dtype=torch.float32, device=q.device)
    by_keys, by_queries = constants("dkdv", q.dtype, D), constants("dq", q.dtype, D)
    if q.numel() > 0:
        lse = lse.contiguous()
        strides = (grad.stride(), q.stride(), k.stride(), v.stride())
        given = (grad, q, k, v, block_table(tuple(block_lengths), q.device), lse, delta)
        _scale_block_attention_delta_kernel[(cdiv(T, _ROWS), NH, B)](
            grad, out, delta, T, NH, grad.stride(), out.stride(), D=D, DP=by_keys["DP"], ROWS=_ROWS,
            num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        _scale_block_attention_dkdv_kernel[(cdiv(T, by_keys["BLOCK_N"]), NH, B)](
            *given, grad_k, grad_v, T, NH, softmax_scale, *strides, **by_keys
        )
        _scale_block_attention_dq_kernel[(cdiv(T, by_queries["BLOCK_M"]), NH, B)](
            *given, grad_q, T, NH, softmax_scale, *strides, **by_queries
        )
    return grad_q, grad_k, grad_v


def cached_attention_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, softmax_scale: float
) -> Tensor:
    """As `reference.cached_attention`."""
    from hitsr_fast.kernels.scale_block_attention import (
        _cached_attention_combine_kernel,
        _cached_attention_kernel,
    )

    B, L, NH, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    share, chosen = decode_plan(B, L, NH, D, length, q.dtype)
    row_tiles, splits = cdiv(L, chosen["BLOCK_M"]), cdiv(length, share)
    parts = log_totals = out
    if splits > 1:
        parts = torch.empty(splits, *q.shape, dtype=torch.float32, device=q.device)
        log_totals = torch.empty(splits, B, NH, L, dtype=torch.float32, device=q.device)
    _cached_attention_kernel[(row_tiles * splits, NH, B)](
        q, k_cache, v_cache, parts, log_totals, L, NH, length, share, row_tiles, softmax_scale * _LOG2E,
        q.stride(), k_cache.stride(), v_cache.stride(), SPLIT=splits > 1, **chosen,
    )  # fmt: skip
    if splits > 1:
        _cached_attention_combine_kernel[(cdiv(L, _COMBINED), NH, B)](
            parts, log_totals, out, L, NH, splits, D=D, DP=chosen["DP"], ROWS=_COMBINED,
            num_warps=4, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return out
