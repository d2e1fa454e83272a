"""Area averages of a map, as rows of a scale."""

import triton
import triton.language as tl


@triton.jit
def _bin(place, size, length):
    """Bounds of an area bin, of which neighbours may overlap: floor(i L / s) and ceil((i + 1) L / s)."""
    return place * length // size, ((place + 1) * length + size - 1) // size


@triton.jit
def pooled_rows(
    x,
    row,
    channel,
    rows,
    h,
    w,
    H,
    W,
    tall,
    broad,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    C: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Area averages (channels, rows) float32 of x (B, C, H, W); row n is place n % (h w) of image n // (h w).

    tall, broad: of the largest bin. Its places are added up one by one in order of rows, whatever the tile
    and the kernel, so that equal maps give equal bits; PLACES of them are loaded at a time.
    """
    image, place = row // (h * w), row % (h * w)
    top, bottom = _bin(place // w, h, H)
    left, right = _bin(place % w, w, W)
    plane = x + image.to(tl.int64)[None, :] * stride_xb + channel.to(tl.int64)[:, None] * stride_xc
    inside = (channel < C)[:, None] & (row < rows)[None, :]
    total = tl.zeros((channel.shape[0], row.shape[0]), tl.float32)
    for first in tl.range(0, tall * broad, PLACES, disable_licm=True):
        for i in tl.static_range(PLACES):
            y, column = top + (first + i) // broad, left + (first + i) % broad
            offset = y.to(tl.int64) * stride_xh + column.to(tl.int64) * stride_xw
            there = inside & ((y < bottom) & (column < right))[None, :]
            total += tl.load(plane + offset[None, :], mask=there, other=0.0).to(tl.float32)
    return total / ((bottom - top) * (right - left)).to(tl.float32)[None, :]


@triton.jit
def store_rows(out, means, row, channel, rows, places, stride_ob, stride_on, stride_oc, C: tl.constexpr):
    """Averages (channels, rows) of `pooled_rows` to out (B, places, C)."""
    image, place = row // places, row % places
    at = out + image.to(tl.int64) * stride_ob + place.to(tl.int64) * stride_on
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    tl.store(at[:, None] + channel.to(tl.int64)[None, :] * stride_oc, tl.trans(means), mask=inside)


@triton.jit(do_not_specialize=["rows", "h", "w", "H", "W", "tall", "broad"])
def _residual_quantize_pool_kernel(
    x,
    out,
    rows,
    h,
    w,
    H,
    W,
    tall,
    broad,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_ob,
    stride_on,
    stride_oc,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PLACES: tl.constexpr,
):
    """out (B, h w, C) = area(x (B, C, H, W), (h, w)); `rows` is B h w."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    means = pooled_rows(
        x, row, channel, rows, h, w, H, W, tall, broad, stride_xb, stride_xc, stride_xh, stride_xw, C, PLACES
    )
    store_rows(out, means, row, channel, rows, h * w, stride_ob, stride_on, stride_oc, C)
