"""Triton kernels of `group_norm_silu`; docs/ops/group_norm_silu.md.

Moments of tiles of a map, which are joined without atomics, then the result. Of the gradient: sums of
tiles, which PyTorch joins, then the result.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(P, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Pixels and channels of a program's tile, and which of them there are."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return pixel[:, None], channel[None, :].to(tl.int64), (pixel < P)[:, None] & (channel < C)[None, :]


@triton.jit
def _group_norm_moments_kernel(
    x, moments, P, stride_x, C: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Of a tile of x (B, C, P), each channel's mean and the sum of the squares of its deviations from that.

    moments: (B, blocks of pixels, 2, C) float32, contiguous.
    """
    image = tl.program_id(2).to(tl.int64)
    pixel, channel, inside = _tile(P, C, PIXELS, CHANNELS)
    at = x + image * stride_x[0] + pixel * stride_x[2] + channel * stride_x[1]
    values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(P - tl.program_id(0) * PIXELS, PIXELS)
    mean = tl.sum(values, axis=0, keep_dims=True) / count
    centred = tl.where(inside, values - mean, 0.0)
    squares = tl.sum(centred * centred, axis=0, keep_dims=True)
    to = moments + (image * tl.num_programs(0) + tl.program_id(0)) * 2 * C + channel
    tl.store(to, mean, mask=channel < C)
    tl.store(to + C, squares, mask=channel < C)


@triton.jit
def _group_norm_join_kernel(
    moments, mean, rstd, P, eps,
    C: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(var + eps) of a group, (B, GROUPS), from the moments of its channels in all tiles.

    BLOCKS: tiles taken at once. WIDTH: power of two, at least C / GROUPS.
    """
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(P, PIXELS)
    channel = tl.arange(0, WIDTH)
    at = moments + image * blocks * 2 * C + group * (C // GROUPS) + channel[None, :]
    # A channel's mean counts for the pixels of its tile: for the group's mean, then for deviations from that.
    sums = tl.zeros((BLOCKS, WIDTH), tl.float32)
    for first in range(0, blocks, BLOCKS):
        block = (first + tl.arange(0, BLOCKS))[:, None]
        inside = (block < blocks) & (channel < C // GROUPS)[None, :]
        count = tl.minimum(P - block * PIXELS, PIXELS).to(tl.float32)
        sums += tl.load(at + block.to(tl.int64) * 2 * C, mask=inside, other=0.0) * (count / P)
    centre = tl.sum(tl.sum(sums, axis=0), axis=0) / (C // GROUPS)
    sums = tl.zeros((BLOCKS, WIDTH), tl.float32)
    for first in range(0, blocks, BLOCKS):
        block = (first + tl.arange(0, BLOCKS))[:, None]
        inside = (block < blocks) & (channel < C // GROUPS)[None, :]
        count = tl.minimum(P - block * PIXELS, PIXELS).to(tl.float32)
        place = at + block.to(tl.int64) * 2 * C
        apart = tl.load(place, mask=inside, other=0.0) - centre
        squares = tl.load(place + C, mask=inside, other=0.0)
        sums += tl.where(inside, (squares + count * apart * apart) / P, 0.0)
    variance = tl.sum(tl.sum(sums, axis=0), axis=0) / (C // GROUPS)
    tl.store(mean + image * GROUPS + group, centre)
    tl.store(rstd + image * GROUPS + group, 1 / tl.sqrt(variance + eps))


@triton.jit
def _group_norm_apply_kernel(
    x, weight, bias, mean, rstd, out, P, stride_x, stride_weight, stride_bias,
    C: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of x (B, C, P), normalised, times weight (C,) plus bias (C,), through SiLU, to out, which has
    the strides of x. mean, rstd: (B, GROUPS)."""
    image = tl.program_id(2).to(tl.int64)
    pixel, channel, inside = _tile(P, C, PIXELS, CHANNELS)
    part = image * GROUPS + channel // (C // GROUPS)
    centre = tl.load(mean + part, mask=channel < C, other=0.0)
    factor = tl.load(weight + channel * stride_weight[0], mask=channel < C, other=0.0).to(tl.float32)
    factor *= tl.load(rstd + part, mask=channel < C, other=0.0)
    offset = tl.load(bias + channel * stride_bias[0], mask=channel < C, other=0.0).to(tl.float32)
    place = image * stride_x[0] + pixel * stride_x[2] + channel * stride_x[1]
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    y = (values - centre) * factor + offset
    tl.store(out + place, y / (1 + tl.exp(-y)), mask=inside)


@triton.jit
def _normal_and_slope(
    x, weight, bias, mean, rstd, place, inside, channel, part, stride_weight, stride_bias, C: tl.constexpr
):  # fmt: skip
    """A tile's values (x - mean) rstd, the derivative of SiLU there, and the rows of weights and of rstd."""
    row = channel < C
    factor = tl.load(weight + channel * stride_weight[0], mask=row, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel * stride_bias[0], mask=row, other=0.0).to(tl.float32)
    centre = tl.load(mean + part, mask=row, other=0.0)
    scale = tl.load(rstd + part, mask=row, other=0.0)
    normal = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - centre) * scale
    y = normal * factor + offset
    s = 1 / (1 + tl.exp(-y))
    return normal, s * (1 + y * (1 - s)), factor, scale


@triton.jit
def _group_norm_sums_kernel(
    x, grad, weight, bias, mean, rstd, sums, P, stride_x, stride_weight, stride_bias,
    C: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of a tile, each channel's sum of the gradients in its normalised values times weight plus bias, and of
    their products with the normalised values. grad has the strides of x.

    sums: (B, blocks of pixels, 2, C) float32, contiguous.
    """
    image = tl.program_id(2).to(tl.int64)
    pixel, channel, inside = _tile(P, C, PIXELS, CHANNELS)
    part = image * GROUPS + channel // (C // GROUPS)
    place = image * stride_x[0] + pixel * stride_x[2] + channel * stride_x[1]
    normal, slope, _factor, _scale = _normal_and_slope(
        x, weight, bias, mean, rstd, place, inside, channel, part, stride_weight, stride_bias, C
    )
    given = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * slope
    # Outside a tile the slope is that at x = 0, which need not be finite.
    given, products = tl.where(inside, given, 0.0), tl.where(inside, given * normal, 0.0)
    to = sums + (image * tl.num_programs(0) + tl.program_id(0)) * 2 * C + channel
    tl.store(to, tl.sum(given, axis=0, keep_dims=True), mask=channel < C)
    tl.store(to + C, tl.sum(products, axis=0, keep_dims=True), mask=channel < C)


@triton.jit
def _group_norm_slope_kernel(
    x, grad, weight, bias, mean, rstd, means, out, P, stride_x, stride_weight, stride_bias,
    C: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient in a tile of x, to out, which has the strides of x and grad.

    means: (B, 2, GROUPS) float32, of a group the mean gradient in its normalised values, and that of its
    products with them.
    """
    image = tl.program_id(2).to(tl.int64)
    pixel, channel, inside = _tile(P, C, PIXELS, CHANNELS)
    group = channel // (C // GROUPS)
    place = image * stride_x[0] + pixel * stride_x[2] + channel * stride_x[1]
    part = image * GROUPS + group
    normal, slope, factor, scale = _normal_and_slope(
        x, weight, bias, mean, rstd, place, inside, channel, part, stride_weight, stride_bias, C
    )
    inner = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * slope * factor
    at = means + image * 2 * GROUPS + group
    plain = tl.load(at, mask=channel < C, other=0.0)
    product = tl.load(at + GROUPS, mask=channel < C, other=0.0)
    tl.store(out + place, (inner - plain - normal * product) * scale, mask=inside)
