"""Triton kernels of `residual_quantize`, `residual_decode` and `residual_step`: two for each scale.

The search pools the residual and finds codes, the update spreads them over the map, adds them to one map and
takes them off the other. docs/ops/residual_quantize.md describes them.
"""

import triton
import triton.language as tl

from ..nearest_code import recheck_rows, screen_tiles, screened_rows

_A = tl.constexpr(-0.75)  # of the cubic kernel


@triton.jit
def _bin(place, size, length):
    """Bounds of an area bin, of which neighbours may overlap: floor(i L / s) and ceil((i + 1) L / s)."""
    return place * length // size, ((place + 1) * length + size - 1) // size


@triton.jit
def pooled_rows(
    x, row, channel, rows, bins, stride_x, C: tl.constexpr, LANES: tl.constexpr, PLACES: tl.constexpr
):  # fmt: skip
    """Area averages (channels, rows) float32 of x (B, C, H, W); row n is place n % (h w) of image n // (h w).

    bins: height and width of the scale, of the map and of the largest bin. The places of a bin, in order of
    rows, are dealt out to LANES: each adds up its own, then lanes are added by pairs. LANES depends on the
    largest bin alone, so that equal maps give equal bits whatever the tile and the kernel; PLACES of each
    lane are loaded at a time.
    """
    h, w, H, W, tall, broad = bins
    image, place = row // (h * w), row % (h * w)
    top, bottom = _bin(place // w, h, H)
    left, right = _bin(place % w, w, W)
    plane = x + image.to(tl.int64)[None, :] * stride_x[0] + channel.to(tl.int64)[:, None] * stride_x[1]
    inside = (channel < C)[:, None] & (row < rows)[None, :]
    total = tl.zeros((channel.shape[0], row.shape[0], LANES), tl.float32)
    for first in tl.range(0, tall * broad, LANES * PLACES, disable_licm=True):
        for i in tl.static_range(PLACES):
            at = first + i * LANES + tl.arange(0, LANES)
            y, column = top[:, None] + (at // broad)[None, :], left[:, None] + (at % broad)[None, :]
            offset = y.to(tl.int64) * stride_x[2] + column.to(tl.int64) * stride_x[3]
            there = inside[:, :, None] & ((y < bottom[:, None]) & (column < right[:, None]))[None, :, :]
            values = tl.load(plane[:, :, None] + offset[None, :, :], mask=there, other=0.0)
            total += values.to(tl.float32)
    for _ in tl.static_range(5):
        if total.shape[2] > 1:
            pairs = total.reshape(channel.shape[0], row.shape[0], 2, total.shape[2] // 2)
            total = tl.sum(pairs, axis=2)
    total = total.reshape(channel.shape[0], row.shape[0])
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
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
    LANES: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """out (B, h w, C) = area(x (B, C, H, W), (h, w)); `rows` is B h w."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    bins = h, w, H, W, tall, broad
    means = pooled_rows(x, row, channel, rows, bins, stride_x, C, LANES, PLACES)
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
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
    LANES: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """indices (B, T) of a scale, from `begin` on: the nearest codes of area(residual (B, C, H, W), (h, w)).

    INPUTS: inputs (B, h w, C) = area(reconstruction (B, C, H, W), (h, w)) as well. mean, codes, half_norms,
    exact and bounds are the packed codebook of `nearest_code`, whose stages these are: a screen that leaves
    a minimum for each class of codes, and a re-check of the classes that may hold the nearest.
    A program (x, y) takes every x-th block of rows, and of the codes `share` tiles. SHARED: several programs
    share out the tiles of a block and the inputs of its rows, each x takes one block, and the last to arrive
    re-checks; `arrived` (x,) is 0 before and after. Rows are pooled BLOCK_M x BLOCK_P at a time. Between the
    stages lie minima (x, tiles, BLOCK_N, CLASSES), pooled and rounded (x, y, BLOCK_N, CP) and margins
    (x, y, 3, BLOCK_N).
    """
    bins = h, w, H, W, tall, broad
    parts: tl.constexpr = (C + BLOCK_P - 1) // BLOCK_P
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
        for turn in tl.range(0, tl.cdiv(count, BLOCK_M) * parts, disable_licm=True):
            some = turn // parts * BLOCK_M + tl.arange(0, BLOCK_M)
            part = turn % parts * BLOCK_P + tl.arange(0, BLOCK_P)
            means = pooled_rows(
                residual, block * BLOCK_N + some, part, rows, bins, stride_residual, C, LANES, PLACES
            )
            tl.store(pooled + some[:, None] * CP + part[None, :], tl.trans(means))
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
            turns = tl.cdiv(count, BLOCK_M) * parts
            for turn in tl.range(tl.program_id(1), turns, shares, disable_licm=True):
                some = block * BLOCK_N + turn // parts * BLOCK_M + tl.arange(0, BLOCK_M)
                part = turn % parts * BLOCK_P + tl.arange(0, BLOCK_P)
                means = pooled_rows(
                    reconstruction, some, part, rows, bins, stride_reconstruction, C, LANES, PLACES
                )
                store_rows(inputs, means, some, part, rows, h * w, stride_inputs, C)
        tl.debug_barrier()  # before the next block's rows take the place of these


@triton.jit
def _neighbours(place, size, length):
    """Of places of a map of `length` spread from one of `size`: the first of four neighbours; a fraction.

    The centre of place i lies at ((2 i + 1) size / length - 1) / 2, which is that fraction beyond the second
    neighbour. In integers it is exact: equal sizes give the place itself, for the weights are 0, 1, 0, 0.
    """
    phase = (2 * place + 1) * size + length
    return phase // (2 * length) - 2, (phase % (2 * length)).to(tl.float32) / (2 * length).to(tl.float32)


@triton.jit
def _weight(fraction, NEIGHBOUR: tl.constexpr):
    """Weight of a neighbour: the inner two are up to one place away, the outer two from one to two."""
    inner: tl.constexpr = NEIGHBOUR == 1 or NEIGHBOUR == 2
    away = tl.abs(fraction - (NEIGHBOUR - 1))
    if inner:
        weight = ((_A + 2) * away - (_A + 3)) * away * away + 1
    else:
        weight = ((_A * away - 5 * _A) * away + 8 * _A) * away - 4 * _A
    return weight


@triton.jit
def _bicubic(codes, codebook, y, x, inside, channel, sizes, stride_t, stride_codebook, C: tl.constexpr):
    """Codes (h, w) of an image at places (n,) of its map (H, W): float32 (n, channels). sizes: h, w, H, W, K.

    Nobody has looked at the codes before: beyond the codebook they count as its first or last one.
    """
    h, w, H, W, K = sizes
    top, down = _neighbours(y, h, H)
    left, aside = _neighbours(x, w, W)
    known = inside[:, None] & (channel < C)[None, :]
    of_channel = channel.to(tl.int64)[None, :] * stride_codebook[1]
    shares = _weight(aside, 0), _weight(aside, 1), _weight(aside, 2), _weight(aside, 3)
    total = tl.zeros((y.shape[0], channel.shape[0]), tl.float32)
    for i in tl.static_range(4):
        line = tl.zeros((y.shape[0], channel.shape[0]), tl.float32)
        row = tl.minimum(tl.maximum(top + i, 0), h - 1) * w
        for j in tl.static_range(4):
            column = tl.minimum(tl.maximum(left + j, 0), w - 1)
            code = tl.load(codes + (row + column).to(tl.int64) * stride_t, mask=inside, other=0)
            code = tl.minimum(tl.maximum(code, 0), K - 1)
            value = tl.load(codebook + code[:, None] * stride_codebook[0] + of_channel, mask=known, other=0.0)
            line = tl.fma(value.to(tl.float32), shares[j][:, None], line)
        total = tl.fma(line, _weight(down, i)[:, None], total)
    return total


@triton.jit
def _product(values, factors, total):
    """total (places, outputs) + values (places, inputs) factors (outputs, inputs)^T in float32."""
    return tl.dot(values, tl.trans(factors.to(tl.float32)), total, input_precision="ieee")


@triton.jit
def _convolution(
    strip, weight, y, x, channel, stride_weight,
    C: tl.constexpr, CP: tl.constexpr, WIDE: tl.constexpr, BLOCK_I: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """3x3 convolution in float32, (places, channels), of a strip (., WIDE, CP) that begins with the halo.

    TOGETHER: the taps of a row are loaded at once, in thrice the shared memory, so that what waits for one
    waits for all.
    """
    inputs = tl.arange(0, BLOCK_I)
    total = tl.zeros((y.shape[0], channel.shape[0]), tl.float32)
    for row in range(3):
        places = strip + ((y + row) * WIDE + x)[:, None] * CP + inputs[None, :]
        taps = weight + row * stride_weight[2] + channel.to(tl.int64)[:, None] * stride_weight[0]
        for first in range(0, CP, BLOCK_I):
            known = (channel < C)[:, None] & (first + inputs < C)[None, :]
            of_input = taps + (first + inputs).to(tl.int64)[None, :] * stride_weight[1]
            if TOGETHER:
                values0, factors0 = tl.load(places + first), tl.load(of_input, mask=known, other=0.0)
                of_input += stride_weight[3]
                values1, factors1 = tl.load(places + CP + first), tl.load(of_input, mask=known, other=0.0)
                of_input += stride_weight[3]
                values2, factors2 = tl.load(places + 2 * CP + first), tl.load(of_input, mask=known, other=0.0)
                total = _product(values0, factors0, total)
                total = _product(values1, factors1, total)
                total = _product(values2, factors2, total)
            else:
                for column in range(3):
                    factors = tl.load(of_input + column * stride_weight[3], mask=known, other=0.0)
                    total = _product(tl.load(places + column * CP + first), factors, total)
    return total


@triton.jit
def _offsets(image, channel, y, x, stride):
    """Of places of a map (B, C, H, W)."""
    return image * stride[0] + channel * stride[1] + y * stride[2] + x * stride[3]


@triton.jit
def _step(
    codes, codebook, weight, bias, strip, corner_y, corner_x, channel, sizes, keep, ratio,
    stride_t, stride_codebook, stride_weight, stride_bias, PHI: tl.constexpr, C: tl.constexpr,
    CP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_I: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """f = phi(bicubic(codes)) of a block of ROWS x COLUMNS places: float32 (places, channels)."""
    place, inputs = tl.arange(0, ROWS * COLUMNS), tl.arange(0, BLOCK_I)
    wide: tl.constexpr = COLUMNS + 2
    H, W = sizes[2], sizes[3]
    if PHI:
        tl.debug_barrier()  # what was in the strip has been read
        for first in range(0, (ROWS + 2) * wide, BLOCK_S):
            at = first + tl.arange(0, BLOCK_S)
            row, column = corner_y + at // wide - 1, corner_x + at % wide - 1
            stored = at < (ROWS + 2) * wide
            known = stored & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            for i in range(0, CP, BLOCK_I):
                line = _bicubic(
                    codes, codebook, row, column, known, i + inputs, sizes, stride_t, stride_codebook, C
                )
                tl.store(strip + at[:, None] * CP + i + inputs[None, :], line, mask=stored[:, None])
        tl.debug_barrier()
        row, column = place // COLUMNS, place % COLUMNS
        through = _convolution(
            strip, weight, row, column, channel, stride_weight, C, CP, wide, BLOCK_I, TOGETHER
        )
        of_bias = tl.load(bias + channel * stride_bias[0], mask=channel < C, other=0.0).to(tl.float32)
        through += of_bias[None, :]
        middle = tl.load(strip + ((row + 1) * wide + column + 1)[:, None] * CP + channel[None, :])
        step = keep * middle + ratio * through
    else:
        y, x = corner_y + place // COLUMNS, corner_x + place % COLUMNS
        known = (y < H) & (x < W)
        step = _bicubic(codes, codebook, y, x, known, channel, sizes, stride_t, stride_codebook, C)
    return step


@triton.jit(do_not_specialize=["blocks", "count", "H", "W", "K"])
def _residual_decode_kernel(
    indices, codebook, weight, bias, reconstruction, strips, scales, blocks, count, H, W, K, keep, ratio,
    stride_indices, stride_codebook, stride_weight, stride_bias, stride_out,
    PHI: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The sum of all scales' f: what updates of one after the other leave, bit for bit.

    weight (P, C, C, 3, 3); bias (P, C); scales (count, 4) int32: first token, h, w, phi. The rest as there.
    """
    place, outputs = tl.arange(0, ROWS * COLUMNS), tl.arange(0, BLOCK_O)
    parts: tl.constexpr = (C + BLOCK_O - 1) // BLOCK_O
    across, down = tl.cdiv(W, COLUMNS), tl.cdiv(H, ROWS)
    strip = strips + tl.program_id(0).to(tl.int64) * ((ROWS + 2) * (COLUMNS + 2) * CP)
    of_phi = stride_weight[1], stride_weight[2], stride_weight[3], stride_weight[4]
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), disable_licm=True):
        channel, tile = block % parts * BLOCK_O + outputs, block // parts
        corner_x, corner_y = tile % across * COLUMNS, tile // across % down * ROWS
        image = (tile // (across * down)).to(tl.int64)
        total = tl.zeros((ROWS * COLUMNS, BLOCK_O), tl.float32)
        for scale in tl.range(0, count, disable_licm=True):
            begin, phi = (
                tl.load(scales + 4 * scale).to(tl.int64),
                tl.load(scales + 4 * scale + 3).to(tl.int64),
            )
            sizes = tl.load(scales + 4 * scale + 1), tl.load(scales + 4 * scale + 2), H, W, K
            codes = indices + image * stride_indices[0] + begin * stride_indices[1]
            total += _step(
                codes, codebook, weight + phi * stride_weight[0], bias + phi * stride_bias[0], strip,
                corner_y, corner_x, channel, sizes, keep, ratio, stride_indices[1], stride_codebook, of_phi,
                (stride_bias[1],), PHI, C, CP, ROWS, COLUMNS, BLOCK_S, BLOCK_I, TOGETHER,
            )  # fmt: skip
        y, x = corner_y + place // COLUMNS, corner_x + place % COLUMNS
        written = (channel < C)[:, None] & ((y < H) & (x < W))[None, :]
        channels, rows, columns = (
            channel.to(tl.int64)[:, None],
            y.to(tl.int64)[None, :],
            x.to(tl.int64)[None, :],
        )
        out = _offsets(image, channels, rows, columns, stride_out)
        tl.store(reconstruction + out, tl.trans(total), mask=written)  # places are neighbours in memory


@triton.jit(do_not_specialize=["blocks", "begin", "h", "w", "H", "W", "K"])
def _residual_quantize_update_kernel(
    indices, codebook, weight, bias, residual, next_residual, reconstruction, next_reconstruction, strips,
    blocks, begin, h, w, H, W, K, keep, ratio,
    stride_indices, stride_codebook, stride_weight, stride_bias, stride_residual, stride_out,
    PHI: tl.constexpr, FIRST: tl.constexpr, RESIDUAL: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """next_reconstruction = reconstruction + f, next_residual = residual - f, for f = phi(bicubic(codes)).

    indices (B, T), the scale's from `begin` on; codebook (K, C); weight (C, C, 3, 3); bias (C,);
    residual (B, C, H, W) of any dtype; next_residual, reconstruction and next_reconstruction float32, of the
    same strides. phi(h) = keep h + ratio (conv(h) + bias), or h without PHI. FIRST: the reconstruction so
    far is 0. RESIDUAL: there is one.
    What is read may be what is written: a program reads its own places, and makes the halo of the
    convolution of codes. strips (programs, (ROWS + 2) (COLUMNS + 2), CP): what a program convolves. A block
    is ROWS x COLUMNS places of an image and BLOCK_O channels.
    """
    sizes = h, w, H, W, K
    place, outputs = tl.arange(0, ROWS * COLUMNS), tl.arange(0, BLOCK_O)
    parts: tl.constexpr = (C + BLOCK_O - 1) // BLOCK_O
    across, down = tl.cdiv(W, COLUMNS), tl.cdiv(H, ROWS)
    strip = strips + tl.program_id(0).to(tl.int64) * ((ROWS + 2) * (COLUMNS + 2) * CP)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), disable_licm=True):
        channel, tile = block % parts * BLOCK_O + outputs, block // parts
        corner_x, corner_y = tile % across * COLUMNS, tile // across % down * ROWS
        image = (tile // (across * down)).to(tl.int64)
        codes = indices + image * stride_indices[0] + begin.to(tl.int64) * stride_indices[1]
        y, x = corner_y + place // COLUMNS, corner_x + place % COLUMNS
        inside = (y < H) & (x < W)
        step = _step(
            codes, codebook, weight, bias, strip, corner_y, corner_x, channel, sizes, keep, ratio,
            stride_indices[1], stride_codebook, stride_weight, stride_bias,
            PHI, C, CP, ROWS, COLUMNS, BLOCK_S, BLOCK_I, TOGETHER,
        )  # fmt: skip
        step = tl.trans(step)  # places are neighbours in memory
        written = (channel < C)[:, None] & inside[None, :]
        rows, columns = y.to(tl.int64)[None, :], x.to(tl.int64)[None, :]
        channels = channel.to(tl.int64)[:, None]
        out = _offsets(image, channels, rows, columns, stride_out)
        before = tl.zeros_like(step)
        if not FIRST:
            before = tl.load(reconstruction + out, mask=written, other=0.0)
        tl.store(next_reconstruction + out, before + step, mask=written)
        if RESIDUAL:
            left = _offsets(image, channels, rows, columns, stride_residual)
            before = tl.load(residual + left, mask=written, other=0.0).to(tl.float32)
            tl.store(next_residual + out, before - step, mask=written)
