"""Triton kernels of `nearest_code`: rows in float16, a screen on tensor cores, and a re-check.

Rows are centred, scaled and rounded. The screen leaves the least scores of classes of codes, by one float16
product; the re-check computes exact distances in the classes that may hold the nearest code, and takes it.
docs/ops/nearest_code.md derives the bounds, hitsr_fast/ops/nearest_code_triton.py packs and launches.
"""

import triton
import triton.language as tl

_SMALLEST = tl.constexpr(
    2.0**-14
)  # least normal number of float16: what is below counts as zero on every chip
_UP = tl.constexpr(1 + 2.0**-10)  # over the rounding of the bound's own arithmetic
_UNDERFLOW = tl.constexpr(2.0**-100)  # more than the squares that vanish in a sum of 256
_RANGE = tl.constexpr(2.0**100)  # of a squared length, for which the bound holds
_INFINITY = tl.constexpr(float("inf"))
_NONE = tl.constexpr(2**30)  # a number beyond all classes and codes


@triton.jit
def _round(centred):
    """float16 rows (rows, CP), and the powers of two (rows,) that take them back to the scale of the codes.

    A row is stretched until its largest value lies in [2^13, 2^14): there float16 drops at most 2^-11 of a
    value, or 2^-27 of the largest.
    """
    largest = tl.max(tl.abs(centred), axis=1)
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 14)
    stretch = ((267 - exponent) << 23).to(tl.float32, bitcast=True)
    back = ((exponent - 13) << 23).to(tl.float32, bitcast=True)
    stretched = centred * stretch[:, None]
    kept = tl.where(tl.abs(stretched) < _SMALLEST, 0.0, stretched).to(tl.float16)
    return kept, back


@triton.jit
def _margins(centred, kept, back, bounds, COSINE: tl.constexpr, CP: tl.constexpr):
    """Of rows (rows,): twice the bound on the error of a score, and what distances in float32 may differ by.

    The second is absolute, on top of the relative error of l2. docs/ops/nearest_code.md derives each line.
    """
    longest, longest_error, longest_given = tl.load(bounds + 2), tl.load(bounds + 3), tl.load(bounds + 4)
    lost = centred - kept.to(tl.float32) * back[:, None]
    length = tl.sqrt(tl.sum(centred * centred, axis=1) + _UNDERFLOW) * _UP
    error = (tl.sqrt(tl.sum(lost * lost, axis=1) + _UNDERFLOW) + 2.0**-23 * length) * _UP
    split = error * longest + (length + error) * longest_error
    summed = (3 * CP + 4) * 2.0**-23 * ((length + longest) * longest + _UNDERFLOW)
    whole = length + longest_given
    definition = (CP + 4) * 2.0**-52 * whole * whole
    exact = _UNDERFLOW + (CP + 4) * 2.0**-22 * length if COSINE else _UNDERFLOW + 0 * length
    return 2 * _UP * (split + summed + definition), exact


@triton.jit
def screened_rows(values, mean, bounds, channels, COSINE: tl.constexpr, C: tl.constexpr, CP: tl.constexpr):
    """Rows (rows, CP) float32 of a group as the screen takes them, and what the re-check must know of them.

    kept, back: of `_round`. slack, exact: of `_margins`, of which slack is -1 for a row beyond the range of
    the bound and -2 for one that is not finite.
    """
    finite = tl.max((tl.abs(values) < float("inf")).to(tl.int32) ^ 1, axis=1) == 0
    # The scale comes in two factors, at most one before and at least one after: large values stay in range as
    # their difference is taken, and small ones keep their digits.
    means = tl.load(mean + channels, mask=channels < C, other=0.0)
    before, after = tl.load(bounds), tl.load(bounds + 1)
    centred = (values * before - means[None, :]) * after
    in_range = finite & (tl.sum(centred * centred, axis=1) < _RANGE)
    centred = tl.where(in_range[:, None], centred, 0.0)
    kept, back = _round(centred)
    slack, exact = _margins(centred, kept, back, bounds, COSINE, CP)
    return kept, back, tl.where(in_range, slack, tl.where(finite, -1.0, -2.0)), exact


@triton.jit
def row_offsets(group, rows, height, width, stride_x):
    """Of the first channel of rows, the positions of maps, one map after the other. group: int64."""
    y = rows // width
    return (
        group * stride_x[0]
        + (y // height).to(tl.int64) * stride_x[1]
        + (y % height).to(tl.int64) * stride_x[2]
        + (rows % width).to(tl.int64) * stride_x[3]
    )


@triton.jit
def _nearest_code_round_kernel(
    x, mean, bounds, rounded, margins, begin, end, height, width, stride_x,
    COSINE: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows [begin, end) of a group in float16, and what the other kernels have to know of them.

    x: any strides; mean (G, C), bounds (G, 5), rounded (G, end - begin, CP) float16, margins
    (G, 3, end - begin): slack and exact of `screened_rows`, and its power of two, negated.
    """
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = end - begin
    channels = tl.arange(0, CP)
    offsets = row_offsets(group, begin + row, height, width, stride_x)
    inside = (row < count)[:, None] & (channels < C)[None, :]
    values = tl.load(
        x + offsets[:, None] + channels.to(tl.int64)[None, :] * stride_x[4], mask=inside, other=0.0
    )
    values = values.to(tl.float32)
    kept, back, slack, exact = screened_rows(
        values, mean + group * C, bounds + group * 5, channels, COSINE, C, CP
    )
    place = (group * count + row)[:, None] * CP + channels[None, :]
    tl.store(rounded + place, kept, mask=(row < count)[:, None])
    margin = margins + group * 3 * count + row
    tl.store(margin, slack, mask=row < count)
    tl.store(margin + count, exact, mask=row < count)
    tl.store(margin + 2 * count, -back, mask=row < count)


@triton.jit
def screen_tiles(
    kept, towards, code, norm, out, stored, first, last, count,
    CP: tl.constexpr, CLASSES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Least scores of rows `kept` (BLOCK_N, CP) in the classes of tiles [first, last).

    code: of the first tile; norm: of tile 0; out: (BLOCK_N, CLASSES) of the first tile, `count` rows a tile.
    Of 2 * CLASSES neighbours in a tile two belong to each class. With four classes these two are, on most
    chips, what one thread holds of the accumulators, so that no minimum crosses threads. The parts of a tile
    share the cost of a turn of the loop at half the registers.
    """
    for tile in range(first, last):
        least = tl.full((BLOCK_N, CLASSES), float("inf"), tl.float32)
        for part in tl.static_range(PARTS):
            dot = tl.dot(kept, tl.load(code + part * BLOCK_K * CP), input_precision="ieee")
            scores = tl.fma(dot, towards, tl.load(norm + (tile * PARTS + part) * BLOCK_K)[None, :])
            scores = scores.reshape(BLOCK_N, BLOCK_K // (2 * CLASSES), CLASSES, 2)
            least = tl.minimum(least, tl.min(tl.min(scores, axis=3), axis=1))
        tl.store(out, least, mask=stored)
        code += PARTS * BLOCK_K * CP
        out += count * CLASSES


@triton.jit
def _nearest_code_screen_kernel(
    rounded, codes, half_norms, minima, margins, count, tiles, tiles_per_program,
    CP: tl.constexpr, CLASSES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Least scores of `count` rows of a group in the classes of some tiles.

    rounded (G, count, CP) float16, margins (G, 3, count): of the round kernel; codes
    (G, tiles * PARTS * BLOCK_K, CP) float16, half_norms (G, tiles * PARTS * BLOCK_K), minima
    (G, tiles, count, CLASSES).
    """
    group = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    stored = (row < count)[:, None]
    channels = tl.arange(0, CP)
    kept = tl.load(rounded + (group * count + row)[:, None] * CP + channels[None, :], mask=stored, other=0.0)
    towards = tl.load(margins + (group * 3 + 2) * count + row, mask=row < count, other=0.0)[:, None]

    first = tl.program_id(1) * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tiles)
    place = (group * tiles + first) * (PARTS * BLOCK_K) + tl.arange(0, BLOCK_K)
    code = codes + place[None, :] * CP + channels[:, None]
    norm = half_norms + group * tiles * (PARTS * BLOCK_K) + tl.arange(0, BLOCK_K)
    out = minima + ((group * tiles + first) * count + row[:, None]) * CLASSES + tl.arange(0, CLASSES)[None, :]
    screen_tiles(
        kept, towards, code, norm, out, stored, first, last, count, CP, CLASSES, BLOCK_N, BLOCK_K, PARTS
    )


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
