"""The modulated layer norm, a row at a time in registers; its backward sums over blocks of rows."""

import triton
import triton.language as tl


@triton.jit
def _modulated_layer_norm_fwd_kernel(
    x,
    scale,
    shift,
    out,
    mean,
    rstd,
    L,
    eps,
    stride_xb,
    stride_xl,
    stride_xc,
    stride_sb,
    stride_sc,
    stride_tb,
    stride_tc,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row (image, token) of x (B, L, C) to out (B, L, C), mean and rstd (B, L), which are contiguous.

    scale, shift: (B, C). BLOCK: power of two, at least C.
    """
    token, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    far = channel.to(tl.int64)
    at = x + image * stride_xb + token.to(tl.int64) * stride_xl
    values = tl.load(at + far * stride_xc, mask=inside, other=0.0).to(tl.float32)
    centre = tl.sum(values, axis=0) / C
    centred = tl.where(inside, values - centre, 0.0)
    missed = tl.sum(centred, axis=0) / C  # what the rounding of the mean left
    centred = tl.where(inside, centred - missed, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + eps)
    factor = tl.load(scale + image * stride_sb + far * stride_sc, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(shift + image * stride_tb + far * stride_tc, mask=inside, other=0.0).to(tl.float32)
    row = image * L + token
    tl.store(out + row * C + channel, centred * inverse * (1 + factor) + offset, mask=inside)
    tl.store(mean + row, centre + missed)
    tl.store(rstd + row, inverse)


@triton.jit
def _modulated_layer_norm_bwd_kernel(
    grad,
    x,
    scale,
    mean,
    rstd,
    grad_x,
    sums,
    L,
    stride_gb,
    stride_gl,
    stride_gc,
    stride_xb,
    stride_xl,
    stride_xc,
    stride_sb,
    stride_sc,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of an image: grad_x (B, L, C), and their part of grad_scale and grad_shift.

    mean, rstd: (B, L). sums: (B, blocks of rows, 2, C) float32. All results are contiguous.
    """
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    far = channel.to(tl.int64)
    factor = 1 + tl.load(scale + image * stride_sb + far * stride_sc, mask=inside, other=0.0).to(tl.float32)
    grad_scale = tl.zeros((BLOCK,), tl.float32)
    grad_shift = tl.zeros((BLOCK,), tl.float32)
    for token in range(block * ROWS, tl.minimum(block * ROWS + ROWS, L)):
        row = image * L + token
        at = grad + image * stride_gb + tl.cast(token, tl.int64) * stride_gl
        given = tl.load(at + far * stride_gc, mask=inside, other=0.0).to(tl.float32)
        at = x + image * stride_xb + tl.cast(token, tl.int64) * stride_xl
        values = tl.load(at + far * stride_xc, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row)
        normal = tl.where(inside, (values - tl.load(mean + row)) * inverse, 0.0)
        inner = given * factor
        grad_scale += given * normal
        grad_shift += given
        result = inner - tl.sum(inner, axis=0) / C - normal * (tl.sum(inner * normal, axis=0) / C)
        tl.store(grad_x + row * C + channel, result * inverse, mask=inside)
    to = sums + (image * tl.num_programs(0) + block) * 2 * C + channel
    tl.store(to, grad_scale, mask=inside)
    tl.store(to + C, grad_shift, mask=inside)
