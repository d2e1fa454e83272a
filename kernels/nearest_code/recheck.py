"""The re-check of `nearest_code`: exact distances in the classes that the screen leaves, and the winner."""

import triton
import triton.language as tl

from .screen import row_offsets

_INFINITY = tl.constexpr(float("inf"))
_NONE = tl.constexpr(2**30)  # a number beyond all classes and codes


@triton.jit
def _classes(minima, group, tiles, count, row, first, CLASSES: tl.constexpr, CHUNK: tl.constexpr):
    """Numbers of a chunk of classes (CHUNK,), and their minima (rows, CHUNK), infinite beyond the last."""
    number = first + tl.arange(0, CHUNK)
    tile = group * tiles + number // CLASSES
    place = (tile[None, :] * count + row[:, None]) * CLASSES + (number % CLASSES)[None, :]
    inside = (number < tiles * CLASSES)[None, :] & (row < count)[:, None]
    return number, tl.load(minima + place, mask=inside, other=_INFINITY)


@triton.jit
def _next(left, number):
    """Of each row the lowest class that is left (rows,), or _NONE; and what is left beside it."""
    lowest = tl.min(tl.where(left > 0, number[None, :], _NONE), axis=1)
    return lowest, tl.where(number[None, :] > lowest[:, None], left, 0)


@triton.jit
def _least(distance, code):
    """Of each row the least distance, and the lowest code that has it."""
    least = tl.min(distance, axis=1)
    return least, tl.min(tl.where(distance == least[:, None], code, _NONE), axis=1)


@triton.jit
def recheck_rows(
    start, stride_c, slack, near, minima, exact, bounds, group, row, count, codes, channels, tiles,
    COSINE: tl.constexpr, CP: tl.constexpr, CLASSES: tl.constexpr, MEMBERS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Index of the nearest code of rows (ROWS,) whose first channels `start` points at.

    slack, near: the two margins of `screened_rows`; minima (groups, tiles, count, CLASSES), of which group
    and row say which; exact, bounds: of the group's codebook.
    Distances in float32 leave one code in nearly every case; the definition, in float64, decides the others.
    """
    in_range = slack >= 0
    lows = tl.full((ROWS, CHUNK), _INFINITY, tl.float32)
    for first in range(0, tiles * CLASSES, CHUNK):
        number, least = _classes(minima, group, tiles, count, row, first, CLASSES, CHUNK)
        lows = tl.minimum(lows, least)
    lowest = tl.min(lows, axis=1)
    limit = tl.where(in_range, lowest + slack + 2.0**-22 * tl.abs(lowest), -_INFINITY)

    # In float32: the nearest code, its distance, and that of the next.
    member = tl.arange(0, MEMBERS)
    before, after = tl.load(bounds), tl.load(bounds + 1)
    best = tl.full((ROWS,), _INFINITY, tl.float32)
    second = tl.full((ROWS,), _INFINITY, tl.float32)
    winner = tl.zeros((ROWS,), tl.int32)
    for first in range(0, tiles * CLASSES, CHUNK):
        number, least = _classes(minima, group, tiles, count, row, first, CLASSES, CHUNK)
        left = (least <= limit[:, None]).to(tl.int32)
        while tl.max(left) > 0:
            chosen, left = _next(left, number)
            code = chosen[:, None] * MEMBERS + member[None, :]
            there = (chosen < _NONE)[:, None] & (code < codes)
            terms = tl.zeros((ROWS, BLOCK_C, MEMBERS), tl.float32)
            for first_channel in range(0, channels, BLOCK_C):
                channel = first_channel + tl.arange(0, BLOCK_C)
                known = (channel < channels)[None, :] & (chosen < _NONE)[:, None]
                value = tl.load(
                    start[:, None] + channel.to(tl.int64)[None, :] * stride_c, mask=known, other=0.0
                )
                place = (chosen[:, None] * channels + channel[None, :]).to(tl.int64) * MEMBERS
                given = tl.load(
                    exact + place[:, :, None] + member[None, None, :], mask=known[:, :, None], other=0.0
                )
                value, given = value.to(tl.float32) * before, given.to(tl.float32)
                if COSINE:
                    terms -= (value * after)[:, :, None] * given
                else:
                    apart = tl.fma(given, -before, value[:, :, None]) * after
                    terms += apart * apart
            distance = tl.where(there, tl.sum(terms, axis=1), _INFINITY)
            nearest, index = _least(distance, code)
            others = tl.min(tl.where(code == index[:, None], _INFINITY, distance), axis=1)
            second = tl.minimum(tl.minimum(second, others), tl.maximum(best, nearest))
            winner = tl.where(nearest < best, index, winner)
            best = tl.minimum(best, nearest)

    # By the definition, where float32 cannot tell: a second code within the bound, or a row beyond its range.
    near += best
    if not COSINE:
        near += best * ((CP + 4) * 2.0**-22)
    undecided = (slack > -2) & ((second <= near) | ~in_range)
    if tl.max(undecided.to(tl.int32)) > 0:
        limit = tl.where(undecided, tl.where(in_range, limit, _INFINITY), -_INFINITY)
        nearest64 = tl.full((ROWS,), _INFINITY, tl.float64)
        winner64 = tl.zeros((ROWS,), tl.int32)
        for first in range(0, tiles * CLASSES, CHUNK):
            number, least = _classes(minima, group, tiles, count, row, first, CLASSES, CHUNK)
            left = ((least <= limit[:, None]) & (number * MEMBERS < codes)[None, :]).to(tl.int32)
            while tl.max(left) > 0:
                chosen, left = _next(left, number)
                code = chosen[:, None] * MEMBERS + member[None, :]
                there = (chosen < _NONE)[:, None] & (code < codes)
                value_at = start
                given_at = exact + chosen.to(tl.int64)[:, None] * channels * MEMBERS + member[None, :]
                distance = tl.zeros((ROWS, MEMBERS), tl.float64)
                for _ in range(channels):
                    value = tl.load(value_at, mask=chosen < _NONE, other=0.0).to(tl.float64)[:, None]
                    given = tl.load(given_at, mask=there, other=0.0).to(tl.float64)
                    if COSINE:
                        distance -= value * given
                    else:
                        apart = value - given
                        distance += apart * apart
                    value_at += stride_c
                    given_at += MEMBERS
                distance = tl.where(there, distance, _INFINITY)
                nearest, index = _least(distance, code)
                winner64 = tl.where(nearest < nearest64, index, winner64)
                nearest64 = tl.minimum(nearest64, nearest)
        winner = tl.where(undecided, winner64, winner)
    return winner


@triton.jit
def _nearest_code_recheck_kernel(
    x, exact, bounds, minima, margins, indices,
    begin, end, height, width, codes, channels, tiles, stride_x, stride_indices,
    COSINE: tl.constexpr, CP: tl.constexpr, CLASSES: tl.constexpr, MEMBERS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Index of the nearest code of rows [begin, end) of a group, from the minima of the screen.

    exact (G, tiles * CLASSES, channels, MEMBERS): float32 as given, or float64 unit vectors for cosine.
    indices (G, rows) int64.
    """
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = end - begin
    start = x + row_offsets(group, begin + row, height, width, stride_x)
    margin = margins + group * 3 * count + row
    slack = tl.load(margin, mask=row < count, other=-2.0)
    near = tl.load(margin + count, mask=row < count, other=0.0)
    winner = recheck_rows(
        start, stride_x[4], slack, near, minima, exact + group * tiles * (CLASSES * MEMBERS) * channels,
        bounds + group * 5, group, row, count, codes, channels, tiles,
        COSINE, CP, CLASSES, MEMBERS, ROWS, BLOCK_C, CHUNK,
    )  # fmt: skip
    tl.store(indices + group * stride_indices[0] + begin + row, winner.to(tl.int64), mask=row < count)
