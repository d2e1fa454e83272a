"""Area averages of a map, as rows; the first kernel of a scale: the nearest codes of such rows."""

import triton
import triton.language as tl

from ..nearest_code.recheck import recheck_rows
from ..nearest_code.screen import screen_tiles, screened_rows


@triton.jit
def _bin(place, size, length):
    """Bounds of an area bin, of which neighbours may overlap: floor(i L / s) and ceil((i + 1) L / s)."""
    return place * length // size, ((place + 1) * length + size - 1) // size


@triton.jit
def pooled_rows(x, row, channel, rows, bins, stride_x, C: tl.constexpr, PLACES: tl.constexpr):
    """Area averages (channels, rows) float32 of x (B, C, H, W); row n is place n % (h w) of image n // (h w).

    bins: height and width of the scale, of the map and of the largest bin. The places of a bin are added up
    one by one in order of rows, whatever the tile and the kernel, so that equal maps give equal bits; PLACES
    of them are loaded at a time.
    """
    h, w, H, W, tall, broad = bins
    image, place = row // (h * w), row % (h * w)
    top, bottom = _bin(place // w, h, H)
    left, right = _bin(place % w, w, W)
    plane = x + image.to(tl.int64)[None, :] * stride_x[0] + channel.to(tl.int64)[:, None] * stride_x[1]
    inside = (channel < C)[:, None] & (row < rows)[None, :]
    total = tl.zeros((channel.shape[0], row.shape[0]), tl.float32)
    for first in tl.range(0, tall * broad, PLACES, disable_licm=True):
        for i in tl.static_range(PLACES):
            y, column = top + (first + i) // broad, left + (first + i) % broad
            offset = y.to(tl.int64) * stride_x[2] + column.to(tl.int64) * stride_x[3]
            there = inside & ((y < bottom) & (column < right))[None, :]
            total += tl.load(plane + offset[None, :], mask=there, other=0.0).to(tl.float32)
    return total / ((bottom - top) * (right - left)).to(tl.float32)[None, :]


@triton.jit
def store_rows(out, means, row, channel, rows, places, stride_out, C: tl.constexpr):
    """Averages (channels, rows) of `pooled_rows` to out (B, places, C)."""
    image, place = row // places, row % places
    at = out + image.to(tl.int64) * stride_out[0] + place.to(tl.int64) * stride_out[1]
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    tl.store(at[:, None] + channel.to(tl.int64)[None, :] * stride_out[2], tl.trans(means), mask=inside)


@triton.jit(do_not_specialize=["rows", "h", "w", "H", "W", "tall", "broad"])
def _residual_quantize_pool_kernel(
    x, out, rows, h, w, H, W, tall, broad, stride_x, stride_out,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """out (B, h w, C) = area(x (B, C, H, W), (h, w)); `rows` is B h w."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    bins = h, w, H, W, tall, broad
    means = pooled_rows(x, row, channel, rows, bins, stride_x, C, PLACES)
    store_rows(out, means, row, channel, rows, h * w, stride_out, C)


@triton.jit(do_not_specialize=["rows", "begin", "h", "w", "H", "W", "tall", "broad", "channels", "share"])
def _residual_quantize_search_kernel(
    residual, reconstruction, indices, inputs, mean, codes, half_norms, exact, bounds,
    minima, pooled, rounded, margins, arrived,
    rows, begin, h, w, H, W, tall, broad, K, channels, tiles, share,
    stride_residual, stride_reconstruction, stride_indices, stride_inputs,
    INPUTS: tl.constexpr, SHARED: tl.constexpr, COSINE: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    CLASSES: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """indices (B, T) of a scale, from `begin` on: the nearest codes of area(residual (B, C, H, W), (h, w)).

    INPUTS: inputs (B, h w, C) = area(reconstruction (B, C, H, W), (h, w)) as well. mean, codes, half_norms,
    exact and bounds are the packed codebook of `nearest_code`, whose stages these are: a screen that leaves
    a minimum for each class of codes, and a re-check of the classes that may hold the nearest.
    A program (x, y) takes every x-th block of rows, and of the codes `share` tiles. SHARED: several programs
    share out the tiles of a block, each x takes one block, and the last to arrive re-checks; `arrived` (x,)
    is 0 before and after. Between the stages lie minima (x, tiles, BLOCK_N, CLASSES), pooled and rounded
    (x, y, BLOCK_N, CP) and margins (x, y, 3, BLOCK_N).
    """
    bins = h, w, H, W, tall, broad
    slot, shares = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tiles)
    member, channel = tl.arange(0, BLOCK_N), tl.arange(0, CP)
    pooled += (slot * shares + tl.program_id(1)) * (BLOCK_N * CP)
    rounded += (slot * shares + tl.program_id(1)) * (BLOCK_N * CP)
    margins += (slot * shares + tl.program_id(1)) * (3 * BLOCK_N)
    # What a stage computes stays in it: hoisted, the addresses of all stages would fill the registers.
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_N), tl.num_programs(0), disable_licm=True):
        row = block * BLOCK_N + member
        count = tl.minimum(rows - block * BLOCK_N, BLOCK_N)
        for skipped in tl.range(0, channels, BLOCK_P, disable_licm=True):
            part = skipped + tl.arange(0, BLOCK_P)
            means = pooled_rows(residual, row, part, rows, bins, stride_residual, C, PLACES)
            tl.store(pooled + member[:, None] * CP + part[None, :], tl.trans(means))
        tl.debug_barrier()
        for start in tl.range(0, count, BLOCK_R, disable_licm=True):
            some = start + tl.arange(0, BLOCK_R)
            place = some[:, None] * CP + channel[None, :]
            values = tl.load(pooled + place, mask=(channel < C)[None, :], other=0.0)
            kept, back, slack, near = screened_rows(values, mean, bounds, channel, COSINE, C, CP)
            tl.store(rounded + place, kept)
            tl.store(margins + some, slack)
            tl.store(margins + BLOCK_N + some, near)
            tl.store(margins + 2 * BLOCK_N + some, -back)
        tl.debug_barrier()
        code = codes + (first.to(tl.int64) * (PARTS * BLOCK_K) + tl.arange(0, BLOCK_K))[None, :] * CP
        least = minima + ((slot * tiles + first) * BLOCK_N + member[:, None]) * CLASSES
        screen_tiles(
            tl.load(rounded + member[:, None] * CP + channel[None, :]),
            tl.load(margins + 2 * BLOCK_N + member)[:, None],
            code + channel[:, None],
            half_norms + tl.arange(0, BLOCK_K),
            least + tl.arange(0, CLASSES)[None, :],
            (row < rows)[:, None],
            first, last, BLOCK_N, CP, CLASSES, BLOCK_N, BLOCK_K, PARTS,
        )  # fmt: skip
        tl.debug_barrier()
        complete = True
        if SHARED:
            complete = tl.atomic_add(arrived + slot, 1, sem="acq_rel", scope="gpu") == shares - 1
        if complete:
            if SHARED:
                tl.store(arrived + slot, 0)
            for start in tl.range(0, count, ROWS, disable_licm=True):
                some = start + tl.arange(0, ROWS)
                slack = tl.load(margins + some, mask=some < count, other=-2.0)
                near = tl.load(margins + BLOCK_N + some)
                winner = recheck_rows(
                    pooled + some * CP, 1, slack, near, minima, exact, bounds, slot, some, BLOCK_N,
                    K, channels, tiles, COSINE, CP, CLASSES, MEMBERS, ROWS, BLOCK_C, CHUNK,
                )  # fmt: skip
                found = block * BLOCK_N + some
                image, token = found // (h * w), found % (h * w)
                at = indices + image.to(tl.int64) * stride_indices[0] + begin + token
                tl.store(at, winner.to(tl.int64), mask=some < count)
            if INPUTS:
                for skipped in tl.range(0, channels, BLOCK_P, disable_licm=True):
                    part = skipped + tl.arange(0, BLOCK_P)
                    means = pooled_rows(
                        reconstruction, row, part, rows, bins, stride_reconstruction, C, PLACES
                    )
                    store_rows(inputs, means, row, part, rows, h * w, stride_inputs, C)
        tl.debug_barrier()  # before the next block's rows take the place of these
