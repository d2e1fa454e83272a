"""Forward of `scale_block_attention`, and `cached_attention`: one softmax, over whole tiles, then cut ones.

First, what all kernels here share: tiles of rows of tensors (B, T, NH, D), their loads and stores.
"""

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of finite float32
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def head_offset(stride):
    """Of the first row of the program's head: axis 2 of the grid is the image, axis 1 the head."""
    return tl.program_id(2).to(tl.int64) * stride[0] + tl.program_id(1).to(tl.int64) * stride[2]


@triton.jit
def tile_offsets(stride, ROWS: tl.constexpr, DP: tl.constexpr):
    """Of the values of a tile (ROWS, DP) from its first."""
    row, column = tl.arange(0, ROWS).to(tl.int64), tl.arange(0, DP).to(tl.int64)
    return row[:, None] * stride[1] + column[None, :] * stride[3]


@triton.jit
def load_tile(head, offsets, first, last, stride, D: tl.constexpr, CUT: tl.constexpr):
    """Rows from `first` on of a head, zeros in the columns from D on; CUT: and in the rows from `last` on."""
    at = head + tl.cast(first, tl.int64) * stride[1] + offsets
    mask = None
    if CUT:
        mask = (first + tl.arange(0, at.shape[0]) < last)[:, None]
    if at.shape[1] != D:
        known = (tl.arange(0, at.shape[1]) < D)[None, :]
        mask = mask & known if CUT else known
    return tl.load(at) if mask is None else tl.load(at, mask=mask, other=0.0)


@triton.jit
def load_rows(x, first, T, stride, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """Rows (ROWS, DP) from `first` on of the program's head of x (B, T, NH, D)."""
    return load_tile(x + head_offset(stride), tile_offsets(stride, ROWS, DP), first, T, stride, D, True)


@triton.jit
def store_rows(out, values, first, T, NH, D: tl.constexpr):
    """Values (ROWS, DP) to the rows from `first` on of the head of out (B, T, NH, D), which is contiguous."""
    row = first + tl.arange(0, values.shape[0])
    column = tl.arange(0, values.shape[1])
    start = (tl.program_id(2).to(tl.int64) * T + row) * NH + tl.program_id(1)
    inside = (row < T)[:, None] & (column < D)[None, :]
    tl.store(out + start[:, None] * D + column[None, :], values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def query_range(blocks, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The program's queries: the first, and all (BLOCK_M,), of which none is beyond T. And the keys that each
    sees, end of those in tiles that all see whole, and end of those that any sees.

    blocks: int32 (2, T), of each token where its block begins and ends.
    """
    # The last tiles see the most keys: they start first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row = tl.minimum(first + tl.arange(0, BLOCK_M), T - 1)
    visible = tl.load(blocks + T + row)
    whole = tl.load(blocks + T + first) // BLOCK_N * BLOCK_N
    last = tl.load(blocks + T + tl.minimum(first + BLOCK_M, T) - 1)
    return first, row, visible, whole, last


@triton.jit
def _attend_tiles(
    query, k, v, acc, peak, total, first, last, visible, scale, stride_k, stride_v,
    D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Take the keys [first, last) into the softmax; CUT: the tiles are not whole."""
    key = tl.arange(0, BLOCK_N)
    k_offsets = tile_offsets(stride_k, BLOCK_N, query.shape[1])
    v_offsets = tile_offsets(stride_v, BLOCK_N, query.shape[1])
    for start in range(first, last, BLOCK_N):
        keys = load_tile(k, k_offsets, start, last, stride_k, D, CUT)
        values = load_tile(v, v_offsets, start, last, stride_v, D, CUT)
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
def _attend(
    query, k, v, begin, whole, last, visible, scale, stride_k, stride_v,
    D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax of queries (BLOCK_M, DP) over the keys [begin, last), in whole tiles up to `whole`.

    Row i sees the keys before visible[i], which are at most `last`. Returns acc (BLOCK_M, DP), peak and total
    (BLOCK_M,): sums relative to 2^peak. Scores count in powers of two: scale holds log2(e), and is positive.
    """
    k += head_offset(stride_k)
    v += head_offset(stride_v)
    acc = tl.zeros(query.shape, tl.float32)
    peak = tl.full((query.shape[0],), -float("inf"), tl.float32)
    total = tl.zeros((query.shape[0],), tl.float32)
    acc, peak, total = _attend_tiles(
        query, k, v, acc, peak, total, begin, whole, visible, scale, stride_k, stride_v,
        D, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    return _attend_tiles(
        query, k, v, acc, peak, total, whole, last, visible, scale, stride_k, stride_v,
        D, BLOCK_N, PRECISION, True,
    )  # fmt: skip


@triton.jit
def _scale_block_attention_fwd_kernel(
    q, k, v, blocks, out, lse, T, NH, scale, stride_q, stride_k, stride_v,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of out (B, T, NH, D), contiguous, and of lse (B, NH, T).

    blocks: of `query_range`. scale: of the scores, times log2(e).
    """
    first, _, visible, whole, last = query_range(blocks, T, BLOCK_M, BLOCK_N)
    query = load_rows(q, first, T, stride_q, D, DP, BLOCK_M)
    acc, peak, total = _attend(
        query, k, v, 0, whole, last, visible, scale, stride_k, stride_v, D, BLOCK_N, PRECISION
    )
    store_rows(out, acc / total[:, None], first, T, NH, D)
    row = first + tl.arange(0, BLOCK_M)
    head = tl.program_id(2).to(tl.int64) * NH + tl.program_id(1)
    tl.store(lse + head * T + row, (peak + tl.log2(total)) * _LN2, mask=row < T)


@triton.jit
def _cached_attention_kernel(
    q, k, v, out, log_totals, L, NH, length, share, row_tiles, scale, stride_q, stride_k, stride_v,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries on the keys [split * share, (split + 1) * share) of the first `length`.

    share: a multiple of BLOCK_N. out: (splits, B, L, NH, D), contiguous; log_totals (splits, B, NH, L): the
    softmax's denominators, logarithms to base 2; written only where keys are SPLIT.
    """
    tile, split = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    first = tile * BLOCK_M
    begin = split * share
    end = tl.minimum(begin + share, length)
    whole = begin + (end - begin) // BLOCK_N * BLOCK_N
    visible = tl.zeros((BLOCK_M,), tl.int32) + end
    query = load_rows(q, first, L, stride_q, D, DP, BLOCK_M)
    acc, peak, total = _attend(
        query, k, v, begin, whole, end, visible, scale, stride_k, stride_v, D, BLOCK_N, PRECISION
    )
    images = tl.num_programs(2)
    store_rows(out + split.to(tl.int64) * images * L * NH * D, acc / total[:, None], first, L, NH, D)
    if SPLIT:
        row = first + tl.arange(0, BLOCK_M)
        head = (split.to(tl.int64) * images + tl.program_id(2)) * NH + tl.program_id(1)
        tl.store(log_totals + head * L + row, peak + tl.log2(total), mask=row < L)


@triton.jit
def _cached_attention_combine_kernel(
    parts, log_totals, out, L, NH, splits, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr
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
    store_rows(out, acc / total[:, None], first, L, NH, D)
