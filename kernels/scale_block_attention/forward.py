"""Forward of `scale_block_attention`, and `cached_attention`: one softmax, over whole tiles, then cut ones.

First, what all kernels here share: tiles of rows of tensors (B, T, NH, D), their loads and stores.
"""

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of finite float32
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def head_offset(stride_b, stride_h):
    """Of the first row of the program's head: axis 2 of the grid is the image, axis 1 the head."""
    return tl.program_id(2).to(tl.int64) * stride_b + tl.program_id(1).to(tl.int64) * stride_h


@triton.jit
def tile_offsets(stride_t, stride_d, ROWS: tl.constexpr, DP: tl.constexpr):
    """Of the values of a tile (ROWS, DP) from its first."""
    row = tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, DP).to(tl.int64)
    return row[:, None] * stride_t + column[None, :] * stride_d


@triton.jit
def load_tile(at, D: tl.constexpr, DP: tl.constexpr):
    """Values of whole rows, zeros in the columns from D to DP."""
    if D == DP:
        return tl.load(at)
    else:
        return tl.load(at, mask=(tl.arange(0, DP) < D)[None, :], other=0.0)


@triton.jit
def load_partial_tile(at, inside, D: tl.constexpr, DP: tl.constexpr):
    """The same with zeros in the rows that are not inside (ROWS,)."""
    if D == DP:
        return tl.load(at, mask=inside[:, None], other=0.0)
    else:
        return tl.load(at, mask=inside[:, None] & (tl.arange(0, DP) < D)[None, :], other=0.0)


@triton.jit
def store_tile(out, values, first, count, T, NH, D: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr):
    """Rows [first, count) of values (ROWS, DP) to the program's head of out (B, T, NH, D), contiguous."""
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, DP)
    start = (tl.program_id(2).to(tl.int64) * T + row) * NH + tl.program_id(1)
    inside = (row < count)[:, None] & (column < D)[None, :]
    tl.store(out + start[:, None] * D + column[None, :], values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def attend(
    query,
    k,
    v,
    acc,
    peak,
    total,
    first,
    last,
    visible,
    scale,
    stride_kt,
    stride_kd,
    stride_vt,
    stride_vd,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    CUT: tl.constexpr,
):
    """Take the keys [first, last) into the softmax of queries (BLOCK_M, DP); returns acc, peak and total.

    k, v: of the head. acc (BLOCK_M, DP), peak, total (BLOCK_M,): sums so far relative to 2^peak, where the
    scores count in powers of two: scale holds log2(e), and is positive.
    CUT: the tiles are not whole; row i sees the keys before visible[i], which are at most `last`.
    """
    key = tl.arange(0, BLOCK_N)
    k_offsets = tile_offsets(stride_kt, stride_kd, BLOCK_N, DP)
    v_offsets = tile_offsets(stride_vt, stride_vd, BLOCK_N, DP)
    for start in range(first, last, BLOCK_N):
        k_at = k + tl.cast(start, tl.int64) * stride_kt + k_offsets
        v_at = v + tl.cast(start, tl.int64) * stride_vt + v_offsets
        if CUT:
            keys = load_partial_tile(k_at, start + key < last, D, DP)
            values = load_partial_tile(v_at, start + key < last, D, DP)
        else:
            keys = load_tile(k_at, D, DP)
            values = load_tile(v_at, D, DP)
        scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        if CUT:
            scores = tl.where((start + key)[None, :] < visible[:, None], scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1) * scale)
        base = tl.maximum(higher, _LOWEST)  # while all scores are -infinity their weights are 0
        weights = tl.exp2(tl.fma(scores, scale, -base[:, None]))
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
        peak = higher
    return acc, peak, total


@triton.jit
def _scale_block_attention_fwd_kernel(
    q,
    k,
    v,
    blocks,
    out,
    lse,
    T,
    NH,
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
):
    """BLOCK_M rows of out (B, T, NH, D), contiguous, and of lse (B, NH, T).

    blocks: int32 (2, T), of each token where its block begins and ends. scale: of the scores, times log2(e).
    """
    # The last tiles see the most keys: they start first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    visible = tl.load(blocks + T + tl.minimum(row, T - 1))
    whole = tl.load(blocks + T + first) // BLOCK_N * BLOCK_N
    last = tl.load(blocks + T + tl.minimum(first + BLOCK_M, T) - 1)
    q += head_offset(stride_qb, stride_qh) + first.to(tl.int64) * stride_qt
    k += head_offset(stride_kb, stride_kh)
    v += head_offset(stride_vb, stride_vh)
    query = load_partial_tile(q + tile_offsets(stride_qt, stride_qd, BLOCK_M, DP), row < T, D, DP)
    acc = tl.zeros((BLOCK_M, DP), tl.float32)
    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc, peak, total = attend(
        query, k, v, acc, peak, total, 0, whole, visible, scale,
        stride_kt, stride_kd, stride_vt, stride_vd, D, DP, BLOCK_M, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    acc, peak, total = attend(
        query, k, v, acc, peak, total, whole, last, visible, scale,
        stride_kt, stride_kd, stride_vt, stride_vd, D, DP, BLOCK_M, BLOCK_N, PRECISION, True,
    )  # fmt: skip
    store_tile(out, acc / total[:, None], first, T, T, NH, D, BLOCK_M, DP)
    head = tl.program_id(2).to(tl.int64) * NH + tl.program_id(1)
    tl.store(lse + head * T + row, (peak + tl.log2(total)) * _LN2, mask=row < T)


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
