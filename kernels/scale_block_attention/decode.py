"""`cached_attention`: queries on the first rows of a cache; the keys are split where queries are few."""

import triton
import triton.language as tl

from .forward import _LOWEST, attend
from .tiles import head_offset, load_partial_tile, store_tile, tile_offsets


@triton.jit
def _cached_attention_kernel(
    q,
    k,
    v,
    out,
    log_totals,
    L,
    NH,
    length,
    share,
    row_tiles,
    scale,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_vd,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """BLOCK_M queries on the keys [split * share, (split + 1) * share) of the first `length`.

    share: a multiple of BLOCK_N. out: (splits, B, L, NH, D), contiguous; log_totals (splits, B, NH, L): the
    softmax's denominators, logarithms to base 2; written only where keys are SPLIT.
    """
    tile, split = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    first = tile * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    begin = split * share
    end = tl.minimum(begin + share, length)
    whole = begin + (end - begin) // BLOCK_N * BLOCK_N
    q += head_offset(stride_qb, stride_qh) + first.to(tl.int64) * stride_qt
    k += head_offset(stride_kb, stride_kh)
    v += head_offset(stride_vb, stride_vh)
    query = load_partial_tile(q + tile_offsets(stride_qt, stride_qd, BLOCK_M, DP), row < L, D, DP)
    visible = tl.zeros((BLOCK_M,), tl.int32) + end
    acc = tl.zeros((BLOCK_M, DP), tl.float32)
    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc, peak, total = attend(
        query, k, v, acc, peak, total, begin, whole, visible, scale,
        stride_kt, stride_kd, stride_vt, stride_vd, D, DP, BLOCK_M, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    acc, peak, total = attend(
        query, k, v, acc, peak, total, whole, end, visible, scale,
        stride_kt, stride_kd, stride_vt, stride_vd, D, DP, BLOCK_M, BLOCK_N, PRECISION, True,
    )  # fmt: skip
    images = tl.num_programs(2)
    out += split.to(tl.int64) * images * L * NH * D
    store_tile(out, acc / total[:, None], first, L, L, NH, D, BLOCK_M, DP)
    if SPLIT:
        head = (split.to(tl.int64) * images + tl.program_id(2)) * NH + tl.program_id(1)
        tl.store(log_totals + head * L + row, peak + tl.log2(total), mask=row < L)


@triton.jit
def _cached_attention_combine_kernel(
    parts,
    log_totals,
    out,
    L,
    NH,
    splits,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of out (B, L, NH, D) from parts (splits, B, L, NH, D) float32 and their log_totals.

    The splits are added in their order: the same result each time.
    """
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, DP)
    image, images = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    totals_at = log_totals + (image * NH + tl.program_id(1)) * L + row
    parts_at = parts + ((image * L + row) * NH + tl.program_id(1))[:, None] * D + column[None, :]
    inside = (row < L)[:, None] & (column < D)[None, :]
    acc = tl.zeros((ROWS, DP), tl.float32)
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for _ in range(splits):
        log_total = tl.load(totals_at, mask=row < L, other=0.0)
        higher = tl.maximum(peak, log_total)
        base = tl.maximum(higher, _LOWEST)
        fade, weight = tl.exp2(peak - base), tl.exp2(log_total - base)
        total = total * fade + weight
        # A split without weight, all of whose scores are -infinity, is NaN.
        part = tl.load(parts_at, mask=inside & (weight != 0)[:, None], other=0.0)
        acc = acc * fade[:, None] + weight[:, None] * part
        peak = higher
        totals_at += images.to(tl.int64) * NH * L
        parts_at += images.to(tl.int64) * NH * L * D
    store_tile(out, acc / total[:, None], first, L, L, NH, D, ROWS, DP)
