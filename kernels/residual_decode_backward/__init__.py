"""Triton kernels of `residual_decode_backward`; docs/ops/residual_quantize.md says what is summed where.

Maps lie with channels last, padded to CP. A token of a scale gathers from a band of columns, then from a band
of rows; `weights (positions, stride)` holds its share of each place of the band. With phi there are a band
and three shares for each axis: those of a place, and of the places before and after it, for the nine taps.
No program adds to what another writes, and no order of sums depends on values: results repeat bit for bit.
"""

import triton
import triton.language as tl

UNROLL = tl.constexpr(4)  # places of a band that are loaded at once


@triton.jit(do_not_specialize=["scales", "H", "W"])
def _residual_decode_backward_reach_kernel(
    grad, grad_per_scale, reached, sums, scales, H, W, stride_grad, stride_per_scale,
    EACH: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """reached (maps, B, H, W, CP) float32: the gradient that reaches each scale, or all of them.

    grad (B, C, H, W); EACH: grad_per_scale (maps, B, C, H, W), of which a scale gets its own and all later
    ones. sums (maps, B, blocks, CP): of a block of places.
    """
    place = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image, images = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    y, x = (place // W).to(tl.int64)[None, :], (place % W).to(tl.int64)[None, :]
    inside = (place < H * W)[None, :]
    known = inside & (channel < C)[:, None]
    far = channel.to(tl.int64)[:, None]
    at = image * stride_grad[0] + far * stride_grad[1] + y * stride_grad[2] + x * stride_grad[3]
    total = tl.load(grad + at, mask=known, other=0.0).to(tl.float32)
    each = grad_per_scale + image * stride_per_scale[1] + far * stride_per_scale[2]
    each += y * stride_per_scale[3] + x * stride_per_scale[4]
    for later in range(scales):
        number = scales - 1 - later
        if EACH:
            own = tl.load(each + tl.cast(number, tl.int64) * stride_per_scale[0], mask=known, other=0.0)
            total += own.to(tl.float32)
        slot = tl.cast(number, tl.int64) * images + image
        out = reached + (slot * (H * W) + place)[:, None] * CP + channel[None, :]
        tl.store(out, tl.trans(total), mask=tl.trans(inside))
        tl.store(sums + (slot * tl.num_programs(0) + tl.program_id(0)) * CP + channel, tl.sum(total, axis=1))


@triton.jit(do_not_specialize=["columns", "H", "W", "stride_weights"])
def _residual_decode_backward_across_kernel(
    reached, bands, weights, across, columns, H, W, stride_weights,
    TAPS: tl.constexpr, CP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """across (B, TAPS, columns, H, CP): the rows of reached (maps, B, H, W, CP) on the columns of all scales.

    bands (3, columns): where a column's band begins, its length, the map that it is of.
    """
    place = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    image, images = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    column, y = place // H, place % H
    known = column < columns
    first = tl.load(bands + column, mask=known, other=0)
    length = tl.load(bands + columns + column, mask=known, other=0)
    number = tl.load(bands + 2 * columns + column, mask=known, other=0).to(tl.int64)
    line = reached + ((number * images + image) * H + y)[:, None] * W * CP + channel[None, :]
    share = weights + column * stride_weights
    before, middle, after = _gathered(line, share, first, length, W, CP, TAPS)
    out = across + ((image * TAPS * columns + column) * H + y)[:, None] * CP + channel[None, :]
    plane = tl.cast(columns, tl.int64) * H * CP
    if TAPS == 1:
        tl.store(out, middle, mask=known[:, None])
    else:
        tl.store(out, before, mask=known[:, None])
        tl.store(out + plane, middle, mask=known[:, None])
        tl.store(out + 2 * plane, after, mask=known[:, None])


@triton.jit
def _gathered(line, share, first, length, side, step: tl.constexpr, TAPS: tl.constexpr):
    """Sums over bands of a line: with the shares of the place before, of the place itself, of that after.

    line: pointers (n, channels) to place 0, which are `step` apart; share: pointers (n,) to the first share.
    Places beyond `side` are 0, as padding is.
    """
    before = tl.zeros(line.shape, tl.float32)
    middle = tl.zeros(line.shape, tl.float32)
    after = tl.zeros(line.shape, tl.float32)
    for start in range(0, tl.max(length, axis=0), UNROLL):
        for i in tl.static_range(UNROLL):
            place = first + start + i
            there = (start + i < length) & (place >= 0) & (place < side)
            value = tl.load(line + (place * step)[:, None], mask=there[:, None], other=0.0)
            at = share + start + i
            if TAPS == 1:
                middle += tl.load(at, mask=there, other=0.0)[:, None] * value
            else:
                before += tl.load(at, mask=there, other=0.0)[:, None] * value
                middle += tl.load(at + 1, mask=there, other=0.0)[:, None] * value
                after += tl.load(at + 2, mask=there, other=0.0)[:, None] * value
    return before, middle, after


@triton.jit
def _of_tokens(
    across, places, bands, weights, token, known, plane, channel, T, columns, rows, H, stride_weights,
    CP: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The rows of an image's plane on tokens: `_gathered`, down the columns. places (2, T): row, column."""
    row = tl.load(places + token, mask=known, other=0)
    column = tl.load(places + T + token, mask=known, other=0)
    first = tl.load(bands + row)
    length = tl.where(known, tl.load(bands + rows + row), 0)
    line = across + (plane * columns + column)[:, None] * H * CP + channel[None, :]
    return _gathered(line, weights + row * stride_weights, first, length, H, CP, TAPS)


@triton.jit
def _factors(weight, tap, output, channel, keep, ratio, centre, C: tl.constexpr):
    """Of a tap (outputs, inputs): phi's weights with r and, at the centre, the identity in them."""
    known = (output < C)[:, None] & (channel < C)[None, :]
    at = weight + (tap * C + output)[:, None] * C + channel[None, :]
    scaled = ratio * tl.load(at, mask=known, other=0.0).to(tl.float32)
    return scaled + tl.where(centre & (output[:, None] == channel[None, :]), keep, 0.0)


@triton.jit(do_not_specialize=["T", "columns", "rows", "H", "stride_weights"])
def _residual_decode_backward_codes_kernel(
    across, places, bands, weights, tiles, weight, out, T, columns, rows, H, stride_weights, keep, ratio,
    TAPS: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """out (B, T, C) float32: the gradient of each token's code.

    tiles (., 3): phi, first token and end of each; weight (P, 9, C, C), contiguous: outputs, then inputs.
    """
    tile, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    phi = tl.load(tiles + 3 * tile).to(tl.int64)
    token = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BLOCK_T)
    known = token < tl.load(tiles + 3 * tile + 2)
    if TAPS == 1:
        _, total, _ = _of_tokens(
            across, places, bands, weights, token, known, image, channel,
            T, columns, rows, H, stride_weights, CP, TAPS,
        )  # fmt: skip
    else:
        total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for start in range(0, CP, BLOCK_C):
            output = start + tl.arange(0, BLOCK_C)
            for aside in range(3):
                before, middle, after = _of_tokens(
                    across, places, bands, weights, token, known, image * 3 + aside, output,
                    T, columns, rows, H, stride_weights, CP, TAPS,
                )  # fmt: skip
                taps = weight + phi * (9 * C * C)
                factors = _factors(taps, aside, output, channel, keep, ratio, False, C)
                total = tl.dot(before, factors, total, input_precision="ieee")
                factors = _factors(taps, 3 + aside, output, channel, keep, ratio, aside == 1, C)
                total = tl.dot(middle, factors, total, input_precision="ieee")
                factors = _factors(taps, 6 + aside, output, channel, keep, ratio, False, C)
                total = tl.dot(after, factors, total, input_precision="ieee")
    to = out + (image * T + token)[:, None] * C + channel[None, :]
    tl.store(to, total, mask=known[:, None] & (channel < C)[None, :])


@triton.jit(do_not_specialize=["T", "columns", "rows", "H", "stride_weights"])
def _residual_decode_backward_phi_kernel(
    across, places, bands, weights, tiles, shares, indices, codebook, partial,
    T, columns, rows, H, stride_weights, stride_indices, stride_codebook,
    C: tl.constexpr, CP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """partial (shares, 9, CP, CP): outputs by inputs of each tap, summed over a share of a phi's tiles.

    shares (., 4): of each the first tile of its phi, their number, and from which to which it sums: tiles of
    the first image come first. A program sums the three taps of a column of the kernel.
    """
    slot, aside = tl.program_id(0), tl.program_id(1)
    blocks: tl.constexpr = CP // BLOCK_C
    output = tl.program_id(2) // blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = tl.program_id(2) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first, count = tl.load(shares + 4 * slot), tl.load(shares + 4 * slot + 1)
    above = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    centre = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    below = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    for item in range(tl.load(shares + 4 * slot + 2), tl.load(shares + 4 * slot + 3)):
        image, tile = (item // count).to(tl.int64), first + item % count
        token = tl.load(tiles + 3 * tile + 1) + tl.arange(0, BLOCK_T)
        known = token < tl.load(tiles + 3 * tile + 2)
        before, middle, after = _of_tokens(
            across, places, bands, weights, token, known, image * 3 + aside, output,
            T, columns, rows, H, stride_weights, CP, 3,
        )  # fmt: skip
        at = indices + image * stride_indices[0] + token.to(tl.int64) * stride_indices[1]
        code = tl.load(at, mask=known, other=0)[:, None] * stride_codebook[0]
        at = codebook + code + channel.to(tl.int64)[None, :] * stride_codebook[1]
        codes = tl.load(at, mask=known[:, None] & (channel < C)[None, :], other=0.0).to(tl.float32)
        above = tl.dot(tl.trans(before), codes, above, input_precision="ieee")
        centre = tl.dot(tl.trans(middle), codes, centre, input_precision="ieee")
        below = tl.dot(tl.trans(after), codes, below, input_precision="ieee")
    to = partial + ((slot.to(tl.int64) * 9 + aside) * CP + output)[:, None] * CP + channel[None, :]
    tl.store(to, above)
    tl.store(to + 3 * CP * CP, centre)
    tl.store(to + 6 * CP * CP, below)


@triton.jit(do_not_specialize=["more"])
def _residual_decode_backward_weight_kernel(
    partial, slots, out, ratio, more, C: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out (P, C, C, 3, 3) float32: ratio times the sums of partial (., 9, CP, CP) over the slots of each phi.

    slots (P + 1,): where those of a phi begin. more: added to what is there.
    """
    entry, phi = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    end = tl.load(slots + phi + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.load(slots + phi), end, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        at = partial + slot.to(tl.int64)[:, None] * (9 * CP * CP) + entry[None, :]
        there = (slot < end)[:, None] & (entry < 9 * CP * CP)[None, :]
        total += tl.sum(tl.load(at, mask=there, other=0.0), axis=0)
    tap, output, channel = entry // (CP * CP), entry // CP % CP, entry % CP
    known = (tap < 9) & (output < C) & (channel < C)
    to = out + ((phi * C + output) * C + channel) * 9 + tap
    total = ratio * total + tl.load(to, mask=known & (more != 0), other=0.0)
    tl.store(to, total, mask=known)


@triton.jit(do_not_specialize=["scales", "count", "more"])
def _residual_decode_backward_bias_kernel(
    sums, phis, out, scales, count, ratio, more,
    EACH: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out (P, C) float32: ratio times what reaches the scales of each phi.

    sums (maps, count, CP): of blocks of places; phis (scales,). more: added to what is there.
    """
    channel, phi = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(1)
    total = tl.zeros((BLOCK_C,), tl.float32)
    users = 0
    for number in range(scales):
        if tl.load(phis + number) == phi:
            if EACH or users == 0:
                of_map = sums + channel[None, :]
                if EACH:
                    of_map += tl.cast(number, tl.int64) * count * CP
                for start in range(0, count, BLOCK_S):
                    block = start + tl.arange(0, BLOCK_S)
                    at = of_map + block.to(tl.int64)[:, None] * CP
                    total += tl.sum(tl.load(at, mask=(block < count)[:, None], other=0.0), axis=0)
            users += 1
    if not EACH:
        total *= users
    to = out + phi * C + channel
    total = ratio * total + tl.load(to, mask=(channel < C) & (more != 0), other=0.0)
    tl.store(to, total, mask=channel < C)


@triton.jit(do_not_specialize=["count", "K"])
def _residual_decode_backward_runs_kernel(
    keys, order, values, out, next_keys, next_values, count, K, stride_out,
    ORDERED: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out[key] (K, C) = the sum of the values (count, C) of a run of equal keys, if a chunk holds all of it.

    A run that goes beyond its chunk leaves its part as an entry for the next launch: each chunk has two, in
    next_keys (chunks, 2) and next_values (chunks, 2, C), for the run that came in and the one that goes out;
    without such a run, or where both are one, 0. Keys below 0 belong to no run.
    ORDERED: the values' rows are order (count,). A chunk is BLOCK_N keys, ROWS at a time.
    """
    chunk = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = tl.minimum(chunk * BLOCK_N + BLOCK_N, count)
    previous = tl.load(keys + chunk * BLOCK_N - 1, mask=chunk > 0, other=-1).to(tl.int32)
    following = tl.load(keys + end, mask=end < count, other=-1).to(tl.int32)
    incoming = tl.zeros((BLOCK_C,), tl.float32)
    outgoing = tl.zeros((BLOCK_C,), tl.float32)
    so_far = tl.zeros((BLOCK_C,), tl.float32)  # of the run that the rows before end with
    for start in range(chunk * BLOCK_N, end, ROWS):
        place = start + tl.arange(0, ROWS)
        inside = place < end
        key = tl.load(keys + place, mask=inside, other=-1).to(tl.int32)
        row = place.to(tl.int64)
        if ORDERED:
            row = tl.load(order + place, mask=inside, other=0)
        at = values + row[:, None] * C + channel[None, :]
        value = tl.load(at, mask=inside[:, None] & (channel < C)[None, :], other=0.0)
        same = key[:, None] == key[None, :]
        total = tl.sum(tl.where(same[:, :, None], value[None, :, :], 0.0), axis=1)
        before = tl.load(keys + start - 1, mask=start > chunk * BLOCK_N, other=-1).to(tl.int32)
        total += tl.where((key == before)[:, None], so_far[None, :], 0.0)
        so_far = tl.sum(tl.where((place == start + ROWS - 1)[:, None], total, 0.0), axis=0)

        after = tl.load(keys + place + 1, mask=place + 1 < end, other=-1).to(tl.int32)
        ends = inside & ((key != after) | (place + 1 == end)) & (key >= 0)
        came, goes = key == previous, key == following
        whole = ends & (came == 0) & (goes == 0) & (key < K)
        to = out + key.to(tl.int64)[:, None] * stride_out + channel[None, :]
        tl.store(to, total, mask=whole[:, None] & (channel < C)[None, :])
        incoming += tl.sum(tl.where((ends & came)[:, None], total, 0.0), axis=0)
        outgoing += tl.sum(tl.where((ends & goes & (came == 0))[:, None], total, 0.0), axis=0)
    to = next_values + tl.cast(chunk, tl.int64) * (2 * C) + channel
    tl.store(to, incoming, mask=channel < C)
    tl.store(to + C, outgoing, mask=channel < C)
    if tl.program_id(1) == 0:
        first = tl.load(keys + chunk * BLOCK_N).to(tl.int32)
        last = tl.load(keys + end - 1).to(tl.int32)
        tl.store(next_keys + 2 * chunk, tl.where(first == previous, first, -1))
        tl.store(next_keys + 2 * chunk + 1, tl.where(last == following, last, -1))
