"""The gated residual, a row at a time; its backward sums the gate's gradient over a block of rows."""

import triton
import triton.language as tl


@triton.jit
def _gated_residual_fwd_kernel(
    x,
    y,
    gate,
    out,
    L,
    stride_xb,
    stride_xl,
    stride_xc,
    stride_yb,
    stride_yl,
    stride_yc,
    stride_gb,
    stride_gc,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row (image, token) of out (B, L, C), contiguous: `x + gate * y`. gate: (B, C)."""
    token, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    far = channel.to(tl.int64)
    factor = tl.load(gate + image * stride_gb + far * stride_gc, mask=inside, other=0.0).to(tl.float32)
    at = x + image * stride_xb + token * stride_xl + far * stride_xc
    values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = y + image * stride_yb + token * stride_yl + far * stride_yc
    branch = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (image * L + token) * C + channel, values + factor * branch, mask=inside)


@triton.jit
def _gated_residual_bwd_kernel(
    grad,
    y,
    gate,
    grad_y,
    sums,
    L,
    stride_xb,
    stride_xl,
    stride_xc,
    stride_yb,
    stride_yl,
    stride_yc,
    stride_gb,
    stride_gc,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of an image: grad_y (B, L, C), and their part of grad_gate.

    sums: (B, blocks of rows, C) float32. stride_x: of grad.
    """
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    far = channel.to(tl.int64)
    factor = tl.load(gate + image * stride_gb + far * stride_gc, mask=inside, other=0.0).to(tl.float32)
    grad_gate = tl.zeros((BLOCK,), tl.float32)
    for token in range(block * ROWS, tl.minimum(block * ROWS + ROWS, L)):
        row = tl.cast(token, tl.int64)
        at = grad + image * stride_xb + row * stride_xl + far * stride_xc
        given = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at = y + image * stride_yb + row * stride_yl + far * stride_yc
        grad_gate += given * tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_y + (image * L + row) * C + channel, given * factor, mask=inside)
    tl.store(sums + (image * tl.num_programs(0) + block) * C + channel, grad_gate, mask=inside)
