"""Triton kernel of `sample_codes`, whose definition is in docs/ops/sample_codes.md.

A program takes one row of logits to one code, all in registers: no sort, but three searches for a threshold.
"""

import triton
import triton.language as tl

_INFINITY = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23
_LOWEST_POWER = tl.constexpr(-40.0)


@triton.jit
def _ordered(bits):
    """Floats' bits as int32 in the same order, and back: the function is its own inverse."""
    return bits ^ ((bits >> 31) & _MAGNITUDE)


@triton.jit
def _threshold(keys, weights, limit, BITS: tl.constexpr):
    """The largest uint32 threshold of BITS bits below which the weights sum to at most `limit`."""
    found = tl.zeros((), tl.uint32)
    for bit in range(BITS):
        raised = found | (tl.full((), 1 << (BITS - 1), tl.uint32) >> bit)
        below = tl.sum(tl.where(keys < raised, weights, 0), axis=0)
        found = tl.where(below <= limit, raised, found)
    return found


@triton.jit
def _weights(keys, largest, scale):
    """int32 `floor(2^30 exp((x - largest) / temperature))`, by the definition's own steps."""
    x = _ordered(keys).to(tl.float32, bitcast=True)
    greatest = _ordered(largest).to(tl.float32, bitcast=True)
    scaled = tl.where(keys == largest, 0.0, (x - greatest) * scale)
    scaled = tl.where(scaled < _LOWEST_POWER, _LOWEST_POWER, scaled)
    whole = scaled + _NEAREST - _NEAREST
    part = scaled - whole
    power = part * 1.5403530393381608e-04 + 1.3333558146428443e-03
    power = power * part + 9.6181291076284770e-03
    power = power * part + 5.5504108664821576e-02
    power = power * part + 2.4022650695910070e-01
    power = power * part + 6.9314718055994530e-01
    power = power * part + 1.0
    exponent = ((whole.to(tl.int32) + 157) << 23).to(tl.float32, bitcast=True)
    return (power * exponent).to(tl.int32)


@triton.jit
def _share(total, high, low):
    """`floor(total * (high 2^31 + low) / 2^62)`, for totals below 2^61."""
    upper, lower = total >> 31, total & _MAGNITUDE
    return upper * high + ((upper * low + lower * high + ((lower * low) >> 31)) >> 31)


@triton.jit
def _random_fraction(state, row):
    """Upper and lower 31 bits of the fraction that a row draws, int64."""
    offset = tl.load(state + 1)
    low, high = (offset & 0xFFFFFFFF).to(tl.uint32), ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    first, second, _, _ = tl.philox(tl.load(state), low, high, row.to(tl.uint32), tl.zeros((), tl.uint32))
    return (first >> 1).to(tl.int64), (second >> 1).to(tl.int64)


@triton.jit
def _factor(settings):
    return tl.load(settings).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["top_k", "dropped_high", "dropped_low"])
def _sample_codes_kernel(
    logits, uncond_logits, state, settings, codes, stride_logits, stride_uncond, V,
    cond, uncond, scale, top_k, dropped_high, dropped_low,
    GUIDED: tl.constexpr, GREEDY: tl.constexpr, SETTINGS: tl.constexpr,
    BLOCK: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Code of one row of (N, V) logits, to codes (N,).

    cond, uncond: factors of the two logits. scale: log2(e) / temperature. top_k: 0 or V keep all. dropped:
    1 - p of top-p, in units of 2^-62, its upper and lower 31 bits. SETTINGS: all of these lie in memory, at
    `settings`, instead. BLOCK: 2^BITS, at least V.
    """
    if SETTINGS:
        cond, uncond, scale = _factor(settings), _factor(settings + 1), _factor(settings + 2)
        top_k, dropped = tl.load(settings + 3), tl.load(settings + 4)
        dropped_high, dropped_low = dropped >> 31, dropped & _MAGNITUDE
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < V
    at = logits + row.to(tl.int64) * stride_logits[0]
    x = tl.load(at + place.to(tl.int64) * stride_logits[1], mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        at = uncond_logits + row.to(tl.int64) * stride_uncond[0]
        other = tl.load(at + place.to(tl.int64) * stride_uncond[1], mask=inside, other=0.0).to(tl.float32)
        x = x * cond - other * uncond
    # -0 is 0, and NaN is -infinity.
    x = tl.where(x == x, x + 0.0, -float("inf"))
    keys = tl.where(inside, _ordered(x.to(tl.int32, bitcast=True)), -_MAGNITUDE - 1)
    largest = tl.max(keys, axis=0)
    if GREEDY:
        tl.store(codes + row, tl.min(tl.where(keys == largest, place, V), axis=0).to(tl.int64))
    else:
        order = (keys ^ (-_MAGNITUDE - 1)).to(tl.uint32, bitcast=True)
        weights = tl.where(inside, _weights(keys, largest, scale), 0)
        if (top_k > 0) & (top_k < V):
            least = _threshold(order, inside.to(tl.int32), V - top_k, 32)
            weights = tl.where(order >= least, weights, 0)
        if (dropped_high | dropped_low) > 0:
            total = tl.sum(weights.to(tl.int64), axis=0)
            limit = _share(total, dropped_high, dropped_low)
            least = _threshold(order, weights.to(tl.int64), limit, 32)
            weights = tl.where(order >= least, weights, 0)
        high, low = _random_fraction(state, row)
        target = _share(tl.sum(weights.to(tl.int64), axis=0), high, low)
        drawn = _threshold(place.to(tl.uint32), weights.to(tl.int64), target, BITS)
        tl.store(codes + row, drawn.to(tl.int64))
