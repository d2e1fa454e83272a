"""Forward of `scale_block_attention`: one online softmax, over whole tiles of keys, then over cut ones."""

import triton
import triton.language as tl

from .tiles import head_offset, load_partial_tile, load_tile, store_tile, tile_offsets

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of finite float32
_LN2 = tl.constexpr(0.6931471805599453)


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
