"""Triton backend of `preference_cross_entropy`: launches kernels/preference_cross_entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hitsr_fast.backends import MAX_GRID, Limit, cdiv

_ROWS = _CODES = _CHANNELS = 64  # of a tile
LIMITS = (
    Limit("K", 0, MAX_GRID * _CODES, "weight"),
    Limit("C", 1, MAX_GRID * _CHANNELS),
)
_MOST_LOGITS = 1 << 22  # of which the backward holds the gradients at a time


def constants(product: torch.dtype) -> dict[str, Any]:
    """Precision and options for products of values of a dtype."""
    import triton.language as tl

    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    half = product != torch.float32
    options = {"num_warps": 4, "num_stages": 2 if half else 1, "enable_fp_fusion": True}
    return {"PRODUCT": types[product], "PRECISION": "ieee", **options}


def _tiles(product: torch.dtype) -> dict[str, Any]:
    """Of logits."""
    return {"BLOCK_N": _ROWS, "BLOCK_K": _CODES, "BLOCK_C": 32, **constants(product)}


def _product_dtype(*tensors: Tensor) -> torch.dtype:
    """Of values that are multiplied: theirs, or float32 where they differ."""
    return tensors[0].dtype if len({t.dtype for t in tensors}) == 1 else torch.float32


def preference_cross_entropy_triton(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rejected: Tensor,
    label_smoothing: float,
    units: bool,
) -> tuple[Tensor, ...]:
    """As `reference.preference_cross_entropy`."""
    from hitsr_fast.kernels.preference_cross_entropy import _preference_cross_entropy_fwd_kernel

    (N, C), K = hidden.shape, len(weight)
    loss, gap, lse = (torch.empty(N, dtype=torch.float32, device=hidden.device) for _ in range(3))
    if N > 0:
        _preference_cross_entropy_fwd_kernel[(cdiv(N, _ROWS),)](
            hidden, weight, bias, target, rejected, loss, gap, lse, N, K, C, label_smoothing,
            hidden.stride(), weight.stride(), _stride(bias), target.stride(), rejected.stride(),
            **_tiles(_product_dtype(hidden, weight)),
        )  # fmt: skip
    none = loss.new_empty(0)
    if not units:
        return loss, gap, lse, none, none.clone(), none.clone()
    given = torch.ones_like(loss), torch.zeros_like(loss), hidden, weight, bias, target, rejected, lse
    return loss, gap, lse, *_gradients(*given, label_smoothing, torch.float32)


def preference_cross_entropy_backward_triton(
    grad_loss: Tensor,
    grad_gap: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rejected: Tensor,
    lse: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.preference_cross_entropy_backward`."""
    of_hidden, of_weight, of_bias = _gradients(
        grad_loss, grad_gap, hidden, weight, bias, target, rejected, lse, label_smoothing, hidden.dtype
    )
    return of_hidden, of_weight.to(weight.dtype), of_bias.to(hidden.dtype if bias is None else bias.dtype)


def _gradients(
    grad_loss: Tensor,
    grad_gap: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rejected: Tensor,
    lse: Tensor,
    label_smoothing: float,
    hidden_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of hidden in `hidden_dtype`, the others in float32."""
    from hitsr_fast.kernels.preference_cross_entropy import _preference_cross_entropy_logits_bwd_kernel

    (N, C), K, device = hidden.shape, len(weight), hidden.device
    of_hidden = torch.empty((N, C), dtype=hidden_dtype, device=device)
    make = torch.empty if N > 0 else torch.zeros
    of_weight = make((K, C), dtype=torch.float32, device=device)
    of_bias = make(0 if bias is None else K, dtype=torch.float32, device=device)
    product = _product_dtype(hidden, weight)
    # Float16 has no room for the small ones.
    dtype = torch.bfloat16 if product == torch.bfloat16 else torch.float32
    together = max(_MOST_LOGITS // K // _ROWS, 1) * _ROWS
    given = torch.empty((min(together, N), K), dtype=dtype, device=device)
    lse = lse.contiguous()
    for first in range(0, N, together):
        last = min(first + together, N)
        rows = [t[first:last] for t in (grad_loss, grad_gap, hidden, target, rejected)]
        _preference_cross_entropy_logits_bwd_kernel[(cdiv(last - first, _ROWS), cdiv(K, _CODES))](
            *rows[:3], weight, bias, *rows[3:], lse[first:], given, last - first, K, C, label_smoothing,
            *(t.stride() for t in rows[:3]), weight.stride(), _stride(bias), *(t.stride() for t in rows[3:]),
            **_tiles(product),
        )  # fmt: skip
        part = given[: last - first]
        _multiply(part, weight, of_hidden[first:last], None, False)
        _multiply(part.T, rows[2], of_weight, None if bias is None else of_bias, first > 0)
    return of_hidden, of_weight, of_bias


def _multiply(left: Tensor, right: Tensor, out: Tensor, sums: Tensor | None, more: bool) -> None:
    """left (M, K) times right (K, N) to out, or added to it; sums: of the rows of left."""
    from hitsr_fast.kernels.preference_cross_entropy import _preference_cross_entropy_product_kernel

    (M, K), N = left.shape, right.shape[1]
    product = _product_dtype(left, right)
    _preference_cross_entropy_product_kernel[(cdiv(M, _CODES), cdiv(N, _CHANNELS))](
        left, right, out, sums, M, N, K, left.stride(), right.stride(), MORE=more, BLOCK_M=64, BLOCK_N=64,
        BLOCK_K=64 if product != torch.float32 else 32, **constants(product),
    )  # fmt: skip


def _stride(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tensor.stride()
