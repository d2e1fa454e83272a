"""Triton kernels of `preference_cross_entropy`; docs/ops/preference_cross_entropy.md.

The forward walks the codes and keeps running sums; the backward writes the gradients of the logits of some
rows and multiplies them. Each sum belongs to one program: no atomics.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(matrix, row, column, stride, rows, columns):
    """Of a matrix, zeros beyond its `rows` and `columns`."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    far_row, far_column = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    return tl.load(matrix + far_row * stride[0] + far_column * stride[1], mask=inside, other=0.0)


@triton.jit
def _logits(
    hidden, weight, bias, row, code, N, K, C, stride_hidden, stride_weight, stride_bias,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of some rows and codes, float32."""
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        values = _tile(hidden, row, channel, stride_hidden, N, C).to(PRODUCT)
        codes = _tile(weight, code, channel, stride_weight, K, C).to(PRODUCT)
        total = tl.dot(values, tl.trans(codes), total, input_precision=PRECISION)
    if bias is not None:
        added = tl.load(bias + code.to(tl.int64) * stride_bias[0], mask=code < K, other=0.0)
        total += added.to(tl.float32)[None, :]
    return total


@triton.jit
def _preference_cross_entropy_fwd_kernel(
    hidden, weight, bias, target, rejected, loss, gap, lse, N, K, C, smoothing,
    stride_hidden, stride_weight, stride_bias, stride_target, stride_rejected,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows: loss, gap and lse (N,), which are contiguous."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < N
    far = row.to(tl.int64)
    wanted = tl.load(target + far * stride_target[0], mask=inside, other=0)
    unwanted = tl.load(rejected + far * stride_rejected[0], mask=inside, other=0)
    peak = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    added = tl.zeros((BLOCK_N,), tl.float32)
    chosen = tl.zeros((BLOCK_N,), tl.float32)
    refused = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, K, BLOCK_K):
        code = start + tl.arange(0, BLOCK_K)
        logits = _logits(
            hidden, weight, bias, row, code, N, K, C, stride_hidden, stride_weight, stride_bias,
            BLOCK_N, BLOCK_K, BLOCK_C, PRODUCT, PRECISION,
        )  # fmt: skip
        known = (code < K)[None, :]
        added += tl.sum(tl.where(known, logits, 0.0), axis=1)
        chosen += tl.sum(tl.where(code[None, :] == wanted[:, None], logits, 0.0), axis=1)
        refused += tl.sum(tl.where(code[None, :] == unwanted[:, None], logits, 0.0), axis=1)
        logits = tl.where(known, logits, -float("inf"))
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # of no finite logit yet: weights of 0, not NaN
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(logits - base[:, None]), axis=1)
        peak = higher
    log = peak + tl.log(total)
    tl.store(loss + far, log - chosen - smoothing * (added / K - chosen), mask=inside)
    tl.store(gap + far, chosen - refused, mask=inside)
    tl.store(lse + far, log, mask=inside)


@triton.jit
def _preference_cross_entropy_logits_bwd_kernel(
    grad_loss, grad_gap, hidden, weight, bias, target, rejected, lse, grad_logits, N, K, C, smoothing,
    stride_loss, stride_gap, stride_hidden, stride_weight, stride_bias, stride_target, stride_rejected,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the gradients of the logits (N, K), which are contiguous. lse: (N,), contiguous."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    code = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = row < N
    far = row.to(tl.int64)
    logits = _logits(
        hidden, weight, bias, row, code, N, K, C, stride_hidden, stride_weight, stride_bias,
        BLOCK_N, BLOCK_K, BLOCK_C, PRODUCT, PRECISION,
    )  # fmt: skip
    wanted = tl.load(target + far * stride_target[0], mask=inside, other=0)
    unwanted = tl.load(rejected + far * stride_rejected[0], mask=inside, other=0)
    of_loss = tl.load(grad_loss + far * stride_loss[0], mask=inside, other=0.0).to(tl.float32)
    of_gap = tl.load(grad_gap + far * stride_gap[0], mask=inside, other=0.0).to(tl.float32)
    log = tl.load(lse + far, mask=inside, other=0.0)
    found = of_loss[:, None] * (tl.exp(logits - log[:, None]) - smoothing / K)
    up = (of_gap - (1 - smoothing) * of_loss)[:, None]
    found += tl.where(code[None, :] == wanted[:, None], up, 0.0)
    found -= tl.where(code[None, :] == unwanted[:, None], of_gap[:, None], 0.0)
    place = grad_logits + far[:, None] * K + code.to(tl.int64)[None, :]
    tl.store(place, found, mask=inside[:, None] & (code < K)[None, :])


@triton.jit
def _preference_cross_entropy_product_kernel(
    left, right, out, sums, M, N, K, stride_left, stride_right,
    MORE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of left (M, K) times right (K, N), to out (M, N), or with MORE added to it; sums (M,), which may
    be None, get those of the rows of left. Both are contiguous."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    of_rows = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        step = start + tl.arange(0, BLOCK_K)
        given = _tile(left, row, step, stride_left, M, K)
        values = _tile(right, step, column, stride_right, K, N)
        total = tl.dot(given.to(PRODUCT), values.to(PRODUCT), total, input_precision=PRECISION)
        if sums is not None:
            of_rows += tl.sum(given.to(tl.float32), axis=1)
    far = row.to(tl.int64)
    inside = (row < M)[:, None] & (column < N)[None, :]
    place = out + far[:, None] * N + column.to(tl.int64)[None, :]
    if MORE:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total, mask=inside)
    if sums is not None and tl.program_id(1) == 0:
        if MORE:
            of_rows += tl.load(sums + far, mask=row < M, other=0.0)
        tl.store(sums + far, of_rows, mask=row < M)
