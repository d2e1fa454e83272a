"""The backward of `scale_block_attention`: one pass by tiles of keys, one by tiles of queries, no atomics.

With weights P = 2^(scale S - log2(e) lse), S = Q K^T and G the gradient of the result:
dV = P^T G, dS = P (G V^T - delta), dK = dS^T Q, dQ = dS K, delta = rowsum(G out).
"""

import triton
import triton.language as tl

from .forward import head_offset, load_rows, load_tile, query_range, store_rows, tile_offsets

_LOG2E = tl.constexpr(1.4426950408889634)


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
