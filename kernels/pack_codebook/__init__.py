"""Triton kernels that pack a codebook for `nearest_code`: the range of each channel, then all parts.

Two launches, nothing is read back. docs/ops/nearest_code.md says what the parts are and derives their bounds,
hitsr_fast/ops/packed_codebook.py launches.
"""

import triton
import triton.language as tl

_SMALLEST = tl.constexpr(2.0**-14)  # least normal number of float16: what is below counts as zero
_UP = tl.constexpr(1 + 2.0**-10)  # over the rounding of lengths in float32
_UNDERFLOW = tl.constexpr(2.0**-100)  # more than the squares that vanish in a sum of 256
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _lengths(start, stride_c, there, channels):
    """Of codes that `start` points at, in float64, squares added channel by channel as in the definition."""
    energy = tl.zeros_like(there).to(tl.float64)
    for _ in range(channels):
        value = tl.load(start, mask=there, other=0.0).to(tl.float64)
        energy += value * value
        start += stride_c
    return tl.where(energy > 0, tl.sqrt(energy), 1.0)


@triton.jit(do_not_specialize=["size", "classes"])
def _pack_codebook_ranges_kernel(
    codebook, ranges, bounds, size, classes, share, stride,
    COSINE: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """ranges (G, programs, 3, C): per channel of every programs-th class, sum over size, least and largest.

    codebook (G, size, C) of any strides, whose unit vectors are meant with COSINE; share: 1 / size. The
    lengths in bounds (G, 5) are set to 0.
    """
    group = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    member = tl.arange(0, MEMBERS)
    total = tl.zeros((MEMBERS, BLOCK_C), tl.float32)
    low = tl.full((MEMBERS, BLOCK_C), _INFINITY, tl.float32)
    high = tl.full((MEMBERS, BLOCK_C), -_INFINITY, tl.float32)
    for number in range(tl.program_id(0), classes, tl.num_programs(0)):
        code = number * MEMBERS + member
        start = codebook + group * stride[0] + code.to(tl.int64) * stride[1]
        inside = (code < size)[:, None] & (channel < C)[None, :]
        given = tl.load(start[:, None] + channel.to(tl.int64)[None, :] * stride[2], mask=inside, other=0.0)
        given = given.to(tl.float32)
        if COSINE:
            given = (given.to(tl.float64) / _lengths(start, stride[2], code < size, C)[:, None]).to(
                tl.float32
            )
        total += given * share
        low = tl.minimum(low, tl.where(inside, given, _INFINITY))
        high = tl.maximum(high, tl.where(inside, given, -_INFINITY))
    out = ranges + (group * tl.num_programs(0) + tl.program_id(0)) * (3 * C) + channel
    tl.store(out, tl.sum(total, axis=0), mask=channel < C)
    tl.store(out + C, tl.min(low, axis=0), mask=channel < C)
    tl.store(out + 2 * C, tl.max(high, axis=0), mask=channel < C)
    if tl.program_id(0) + tl.program_id(1) == 0:
        for i in tl.static_range(2, 5):
            tl.store(bounds + group * 5 + i, 0.0)


@triton.jit
def _centre(ranges, channel, programs, C: tl.constexpr, PROGRAMS: tl.constexpr):
    """Of channels, near the mean of the codes; and half of a bound on how far a code lies from it."""
    program = tl.arange(0, PROGRAMS)
    place = ranges + program[:, None] * (3 * C) + channel[None, :]
    known = (program < programs)[:, None] & (channel < C)[None, :]
    mean = tl.sum(tl.load(place, mask=known, other=0.0), axis=0)
    low = tl.min(tl.load(place + C, mask=known, other=_INFINITY), axis=0)
    high = tl.max(tl.load(place + 2 * C, mask=known, other=-_INFINITY), axis=0)
    low, high = tl.where(channel < C, low, 0.0), tl.where(channel < C, high, 0.0)
    mean = tl.minimum(tl.maximum(mean, low), high)
    far = tl.maximum(high * 0.5 - mean * 0.5, mean * 0.5 - low * 0.5)
    # The second term: unit vectors were rounded to float32, and a mean may be added up in another order.
    return mean, far + 2.0**-21 * tl.maximum(tl.abs(low), tl.abs(high))


@triton.jit
def _bits(length):
    """As integers that sort as lengths do, NaN last: their maximum depends on no order."""
    return length.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit(do_not_specialize=["size", "classes", "programs"])
def _pack_codebook_kernel(
    codebook, ranges, mean, codes, half_norms, exact, bounds, lengths, size, classes, programs, stride,
    COSINE: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BLOCK_C: tl.constexpr, CLASSES: tl.constexpr,
    MEMBERS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The parts of a packed codebook; a program packs one of `classes` classes.

    mean (G, C), codes (G, classes * MEMBERS, CP) float16, half_norms (G, classes * MEMBERS), exact
    (G, classes, C, MEMBERS), bounds (G, 5), of which `lengths` are the bits; ranges (G, programs, 3, C) of
    the other kernel.
    """
    group, number = tl.program_id(1).to(tl.int64), tl.program_id(0)
    member, channels = tl.arange(0, MEMBERS), tl.arange(0, BLOCK_C)
    code = number * MEMBERS + member
    start = codebook + group * stride[0] + code.to(tl.int64) * stride[1]
    ranges += group * programs * (3 * C)

    # A power of two that brings all values below 2^14, in two factors: one of at most, one of at least 1.
    far = 0.0
    for first in range(0, C, BLOCK_C):
        _, reach = _centre(ranges, first + channels, programs, C, PROGRAMS)
        far = tl.maximum(far, tl.max(reach, axis=0))
    exponent = tl.minimum(139 - (_bits(far) >> 23), 126)
    exponent = tl.where(far == 0.0, 0, exponent)
    before = ((tl.minimum(exponent, 0) + 127) << 23).to(tl.float32, bitcast=True)
    after = ((tl.maximum(exponent, 0) + 127) << 23).to(tl.float32, bitcast=True)

    if COSINE:
        length = _lengths(start, stride[2], code < size, C)
    # Neighbours in a tile take turns by pairs: see the screen.
    tile = number // CLASSES * (CLASSES * MEMBERS)
    place = group * classes * MEMBERS + tile + member // 2 * (2 * CLASSES) + number % CLASSES * 2 + member % 2
    squares = tl.zeros((MEMBERS,), tl.float32)
    lost_squares = tl.zeros((MEMBERS,), tl.float32)
    for first in range(0, CP, BLOCK_C):
        channel = first + channels
        inside = (code < size)[:, None] & (channel < C)[None, :]
        given = tl.load(start[:, None] + channel.to(tl.int64)[None, :] * stride[2], mask=inside, other=0.0)
        given = given.to(tl.float32)
        middle, _ = _centre(ranges, channel, programs, C, PROGRAMS)
        middle *= before
        if COSINE:
            given = given.to(tl.float64) / length[:, None]
            centred = (given * before - middle[None, :]).to(tl.float32) * after
            middle *= 0.0
        else:
            centred = (given * before - middle[None, :]) * after
        centred = tl.where(inside, centred, 0.0)
        kept = tl.where(tl.abs(centred) < _SMALLEST, 0.0, centred).to(tl.float16)
        lost = centred - kept.to(tl.float32)
        squares += tl.sum(centred * centred, axis=1)
        lost_squares += tl.sum(lost * lost, axis=1)
        tl.store(codes + place[:, None] * CP + channel[None, :], kept)
        at = (group * classes + number) * C + channel
        tl.store(exact + at[None, :] * MEMBERS + member[:, None], given, mask=(channel < C)[None, :])
        tl.store(mean + group * C + channel, middle, mask=(channel < C) & (number == 0))

    half = squares * 0.0 if COSINE else squares * 0.5
    tl.store(half_norms + place, tl.where(code < size, half, _INFINITY))
    longest = tl.sqrt(squares + _UNDERFLOW) * _UP
    lost_most = (tl.sqrt(lost_squares + _UNDERFLOW) + 2.0**-23 * longest) * _UP
    bounds += group * 5
    lengths += group * 5
    tl.atomic_max(lengths + 2, tl.max(_bits(longest), axis=0), sem="relaxed")
    tl.atomic_max(lengths + 3, tl.max(_bits(lost_most), axis=0), sem="relaxed")
    if not COSINE:
        tl.atomic_max(lengths + 4, tl.max(_bits(longest), axis=0), sem="relaxed")
    if number == 0:
        tl.store(bounds, before)
        tl.store(bounds + 1, after)
        if COSINE:
            tl.store(bounds + 4, before * after * _UP)
