"""Triton kernels of `modulated_layer_norm`, `gated_residual` and both; docs/ops/modulated_layer_norm.md.

A row at a time in registers; the backward passes sum over blocks of rows.
"""

import triton
import triton.language as tl


@triton.jit
def _of_image(vectors, image, far, stride, inside):
    """Channels `far` of an image's row of vectors (B, C), float32."""
    at = vectors + image * stride[0] + far * stride[1]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _centred(values, inside, eps, C: tl.constexpr):
    """A row less its mean, the mean, and one over the root of the variance and eps."""
    centre = tl.sum(values, axis=0) / C
    centred = tl.where(inside, values - centre, 0.0)
    missed = tl.sum(centred, axis=0) / C  # what the rounding of the mean left
    centred = tl.where(inside, centred - missed, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + eps)
    return centred, centre + missed, inverse


@triton.jit(do_not_specialize=["L"])  # which differs from scale to scale
def _modulated_layer_norm_fwd_kernel(
    x, scale, shift, out, mean, rstd, L, eps, stride_x, stride_scale, stride_shift,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row (image, token) of x (B, L, C) to out (B, L, C), mean and rstd (B, L), which are contiguous.

    scale, shift: (B, C). BLOCK: power of two, at least C.
    """
    token, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    far = channel.to(tl.int64)
    at = x + image * stride_x[0] + token.to(tl.int64) * stride_x[1]
    values = tl.load(at + far * stride_x[2], mask=inside, other=0.0).to(tl.float32)
    factor = _of_image(scale, image, far, stride_scale, inside)
    offset = _of_image(shift, image, far, stride_shift, inside)
    centred, centre, inverse = _centred(values, inside, eps, C)
    row = image * L + token
    tl.store(out + row * C + channel, centred * inverse * (1 + factor) + offset, mask=inside)
    tl.store(mean + row, centre)
    tl.store(rstd + row, inverse)


@triton.jit
def _modulated_layer_norm_bwd_kernel(
    grad, x, scale, mean, rstd, grad_x, sums, L, stride_grad, stride_x, stride_scale,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of an image: grad_x (B, L, C), and their part of grad_scale and grad_shift.

    mean, rstd: (B, L). sums: (B, blocks of rows, 2, C) float32. All results are contiguous.
    """
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    far = channel.to(tl.int64)
    factor = 1 + _of_image(scale, image, far, stride_scale, inside)
    grad_scale = tl.zeros((BLOCK,), tl.float32)
    grad_shift = tl.zeros((BLOCK,), tl.float32)
    for token in range(block * ROWS, tl.minimum(block * ROWS + ROWS, L)):
        row = image * L + token
        at = grad + image * stride_grad[0] + tl.cast(token, tl.int64) * stride_grad[1]
        given = tl.load(at + far * stride_grad[2], mask=inside, other=0.0).to(tl.float32)
        at = x + image * stride_x[0] + tl.cast(token, tl.int64) * stride_x[1]
        values = tl.load(at + far * stride_x[2], mask=inside, other=0.0).to(tl.float32)
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


@triton.jit(do_not_specialize=["L"])  # which differs from scale to scale
def _gated_residual_fwd_kernel(
    x, y, gate, out, L, stride_x, stride_y, stride_gate, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Row (image, token) of out (B, L, C), contiguous: `x + gate * y`. gate: (B, C)."""
    token, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    far = channel.to(tl.int64)
    factor = _of_image(gate, image, far, stride_gate, inside)
    at = x + image * stride_x[0] + token * stride_x[1] + far * stride_x[2]
    values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = y + image * stride_y[0] + token * stride_y[1] + far * stride_y[2]
    branch = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (image * L + token) * C + channel, values + factor * branch, mask=inside)


@triton.jit(do_not_specialize=["L"])
def _gated_residual_norm_kernel(
    x, y, gate, scale, shift, total, out, L, eps,
    stride_x, stride_y, stride_gate, stride_scale, stride_shift, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row (image, token) of total = x + gate * y and of its norm, out; both (B, L, C), contiguous."""
    token, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    far = channel.to(tl.int64)
    at = x + image * stride_x[0] + token * stride_x[1] + far * stride_x[2]
    values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = y + image * stride_y[0] + token * stride_y[1] + far * stride_y[2]
    branch = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    values = values + _of_image(gate, image, far, stride_gate, inside) * branch
    rounded = values.to(total.dtype.element_ty)
    row = (image * L + token) * C
    tl.store(total + row + channel, rounded, mask=inside)
    factor = _of_image(scale, image, far, stride_scale, inside)
    offset = _of_image(shift, image, far, stride_shift, inside)
    centred, _, inverse = _centred(rounded.to(tl.float32), inside, eps, C)
    tl.store(out + row + channel, centred * inverse * (1 + factor) + offset, mask=inside)


@triton.jit
def _gated_residual_bwd_kernel(
    grad, y, gate, grad_y, sums, L, stride_grad, stride_y, stride_gate,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of an image: grad_y (B, L, C), and their part of grad_gate.

    sums: (B, blocks of rows, C) float32.
    """
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < C
    far = channel.to(tl.int64)
    factor = _of_image(gate, image, far, stride_gate, inside)
    grad_gate = tl.zeros((BLOCK,), tl.float32)
    for token in range(block * ROWS, tl.minimum(block * ROWS + ROWS, L)):
        row = tl.cast(token, tl.int64)
        at = grad + image * stride_grad[0] + row * stride_grad[1] + far * stride_grad[2]
        given = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at = y + image * stride_y[0] + row * stride_y[1] + far * stride_y[2]
        grad_gate += given * tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_y + (image * L + row) * C + channel, given * factor, mask=inside)
    tl.store(sums + (image * tl.num_programs(0) + block) * C + channel, grad_gate, mask=inside)
