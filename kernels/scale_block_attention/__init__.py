"""Triton kernels of `scale_block_attention` and `cached_attention`; docs/ops/scale_block_attention.md.

First, what all share: tiles of rows of tensors (B, T, NH, D), their loads and stores. The forwards have one
softmax, over whole tiles, then cut ones. The backward is one pass by tiles of keys and one by tiles of
queries, without atomics: with weights P = 2^(scale S - log2(e) lse), S = Q K^T and G the result's gradient,
dV = P^T G, dS = P (G V^T - delta), dK = dS^T Q, dQ = dS K, delta = rowsum(G out).
"""

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of finite float32
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)


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


# What differs from scale to scale is no reason to compile again.
@triton.jit(do_not_specialize=["L", "length", "row_tiles"])
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


@triton.jit(do_not_specialize=["L", "splits"])
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


@triton.jit
def _scale_block_attention_delta_kernel(
    grad, out, delta, T, NH, stride_grad, stride_out, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr
):
    """ROWS rows of delta (B, NH, T): rowsum(grad * out)."""
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    given = load_rows(grad, first, T, stride_grad, D, DP, ROWS)
    result = load_rows(out, first, T, stride_out, D, DP, ROWS)
    head = tl.program_id(2).to(tl.int64) * NH + tl.program_id(1)
    sums = tl.sum(given.to(tl.float32) * result.to(tl.float32), axis=1)
    tl.store(delta + head * T + row, sums, mask=row < T)


@triton.jit
def _dkdv_step(
    keys, values, grad_k, grad_v, key, start, q, grad, ends, lse, delta, T, scale,
    q_offsets, g_offsets, stride_q, stride_grad,
    D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Add what BLOCK_M queries from `start` give to the gradients (BLOCK_N, DP) of keys and values."""
    row = start + tl.arange(0, BLOCK_M)
    query = load_tile(q, q_offsets, start, T, stride_q, D, CUT)
    given = load_tile(grad, g_offsets, start, T, stride_grad, D, CUT)
    if CUT:
        log_total = tl.load(lse + row, mask=row < T, other=0.0) * _LOG2E
        inner = tl.load(delta + row, mask=row < T, other=0.0)
    else:
        log_total = tl.load(lse + row) * _LOG2E
        inner = tl.load(delta + row)
    scores = tl.dot(keys, tl.trans(query), input_precision=PRECISION)
    weights = tl.exp2(tl.fma(scores, scale, -log_total[None, :]))
    if CUT:
        visible = tl.load(ends + row, mask=row < T, other=0)
        weights = tl.where(key[:, None] < visible[None, :], weights, 0.0)
    grad_v = tl.dot(weights.to(given.dtype), given, grad_v, input_precision=PRECISION)
    outer = tl.dot(values, tl.trans(given), input_precision=PRECISION)
    grad_scores = (weights * (outer - inner[None, :])).to(query.dtype)
    grad_k = tl.dot(grad_scores, query, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def _scale_block_attention_dkdv_kernel(
    grad, q, k, v, blocks, lse, delta, grad_k, grad_v, T, NH, softmax_scale,
    stride_grad, stride_q, stride_k, stride_v,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of grad_k and grad_v (B, T, NH, D), contiguous.

    blocks: int32 (2, T), of each token where its block begins and ends. lse, delta: (B, NH, T), contiguous.
    """
    first = tl.program_id(0) * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)
    # Queries see the first key from `begin` on and the last one from `all_from` on. The tiles before `whole`
    # are cut, and so is the last one where queries run out.
    begin = tl.load(blocks + first)
    all_from = tl.load(blocks + tl.minimum(first + BLOCK_N, T) - 1)
    heads = tl.cdiv(all_from - begin, BLOCK_M)
    whole = begin + heads * BLOCK_M
    whole_end = whole + tl.maximum(T - whole, 0) // BLOCK_M * BLOCK_M
    cuts = heads + (whole_end < T).to(tl.int32)

    head = (tl.program_id(2).to(tl.int64) * NH + tl.program_id(1)) * T
    lse += head
    delta += head
    q += head_offset(stride_q)
    grad += head_offset(stride_grad)
    keys = load_rows(k, first, T, stride_k, D, DP, BLOCK_N)
    values = load_rows(v, first, T, stride_v, D, DP, BLOCK_N)
    q_offsets = tile_offsets(stride_q, BLOCK_M, DP)
    g_offsets = tile_offsets(stride_grad, BLOCK_M, DP)
    scale = softmax_scale * _LOG2E
    sum_k = tl.zeros((BLOCK_N, DP), tl.float32)
    sum_v = tl.zeros((BLOCK_N, DP), tl.float32)
    for start in range(whole, whole_end, BLOCK_M):
        sum_k, sum_v = _dkdv_step(
            keys, values, sum_k, sum_v, key, start, q, grad, blocks + T, lse, delta, T, scale,
            q_offsets, g_offsets, stride_q, stride_grad, D, BLOCK_M, PRECISION, False,
        )  # fmt: skip
    for cut in range(cuts):
        start = tl.where(cut < heads, begin + cut * BLOCK_M, whole_end)
        sum_k, sum_v = _dkdv_step(
            keys, values, sum_k, sum_v, key, start, q, grad, blocks + T, lse, delta, T, scale,
            q_offsets, g_offsets, stride_q, stride_grad, D, BLOCK_M, PRECISION, True,
        )  # fmt: skip
    store_rows(grad_k, sum_k * softmax_scale, first, T, NH, D)
    store_rows(grad_v, sum_v, first, T, NH, D)


@triton.jit
def _dq_step(
    query, given, grad_q, log_total, inner, visible, start, last, k, v, scale,
    k_offsets, v_offsets, stride_k, stride_v,
    D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Add what BLOCK_N keys from `start` give to the gradient (BLOCK_M, DP) of the queries."""
    key = start + tl.arange(0, BLOCK_N)
    keys = load_tile(k, k_offsets, start, last, stride_k, D, CUT)
    values = load_tile(v, v_offsets, start, last, stride_v, D, CUT)
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    weights = tl.exp2(tl.fma(scores, scale, -log_total[:, None]))
    if CUT:
        weights = tl.where(key[None, :] < visible[:, None], weights, 0.0)
    outer = tl.dot(given, tl.trans(values), input_precision=PRECISION)
    grad_scores = (weights * (outer - inner[:, None])).to(keys.dtype)
    return tl.dot(grad_scores, keys, grad_q, input_precision=PRECISION)


@triton.jit
def _scale_block_attention_dq_kernel(
    grad, q, k, v, blocks, lse, delta, grad_q, T, NH, softmax_scale,
    stride_grad, stride_q, stride_k, stride_v,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of grad_q (B, T, NH, D), contiguous; the other arguments are those of the other pass."""
    first, row, visible, whole, last = query_range(blocks, T, BLOCK_M, BLOCK_N)
    head = (tl.program_id(2).to(tl.int64) * NH + tl.program_id(1)) * T
    log_total = tl.load(lse + head + row) * _LOG2E
    inner = tl.load(delta + head + row)
    query = load_rows(q, first, T, stride_q, D, DP, BLOCK_M)
    given = load_rows(grad, first, T, stride_grad, D, DP, BLOCK_M)
    k += head_offset(stride_k)
    v += head_offset(stride_v)
    k_offsets = tile_offsets(stride_k, BLOCK_N, DP)
    v_offsets = tile_offsets(stride_v, BLOCK_N, DP)
    scale = softmax_scale * _LOG2E
    sums = tl.zeros((BLOCK_M, DP), tl.float32)
    for start in range(0, whole, BLOCK_N):
        sums = _dq_step(
            query, given, sums, log_total, inner, visible, start, last, k, v, scale,
            k_offsets, v_offsets, stride_k, stride_v, D, BLOCK_N, PRECISION, False,
        )  # fmt: skip
    for start in range(whole, last, BLOCK_N):
        sums = _dq_step(
            query, given, sums, log_total, inner, visible, start, last, k, v, scale,
            k_offsets, v_offsets, stride_k, stride_v, D, BLOCK_N, PRECISION, True,
        )  # fmt: skip
    store_rows(grad_q, sums * softmax_scale, first, T, NH, D)
