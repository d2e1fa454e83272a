"""The first kernel of a scale: the residual pooled, and the nearest code of each of its rows."""

import triton
import triton.language as tl

from ..nearest_code.recheck import recheck_rows
from ..nearest_code.rows import screened_rows
from ..nearest_code.screen import screen_tiles
from .pool import pooled_rows, store_rows


@triton.jit(do_not_specialize=["rows", "begin", "h", "w", "H", "W", "tall", "broad", "channels", "share"])
def _residual_quantize_search_kernel(
    residual,
    reconstruction,
    indices,
    inputs,
    mean,
    codes,
    half_norms,
    exact,
    bounds,
    minima,
    pooled,
    rounded,
    margins,
    arrived,
    rows,
    begin,
    h,
    w,
    H,
    W,
    tall,
    broad,
    K,
    channels,
    tiles,
    share,
    stride_rb,
    stride_rc,
    stride_rh,
    stride_rw,
    stride_fb,
    stride_fc,
    stride_fh,
    stride_fw,
    stride_ib,
    stride_nb,
    stride_nt,
    stride_nc,
    INPUTS: tl.constexpr,
    SHARED: tl.constexpr,
    COSINE: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    CLASSES: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PLACES: tl.constexpr,
):
    """indices (B, T) of a scale, from `begin` on: the nearest codes of area(residual (B, C, H, W), (h, w)).

    INPUTS: inputs (B, h w, C) = area(reconstruction (B, C, H, W), (h, w)) as well. mean, codes, half_norms,
    exact and bounds are the packed codebook of `nearest_code`, whose stages these are: a screen that leaves
    a minimum for each class of codes, and a re-check of the classes that may hold the nearest.
    A program (x, y) takes every x-th block of rows, and of the codes `share` tiles. SHARED: several programs
    share out the tiles of a block, each x takes one block, and the last to arrive re-checks; `arrived` (x,)
    is 0 before and after. Between the stages lie minima (x, tiles, BLOCK_N, CLASSES), pooled and rounded
    (x, y, BLOCK_N, CP) and margins (x, y, 3, BLOCK_N).
    """
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
            means = pooled_rows(
                residual,
                row,
                part,
                rows,
                h,
                w,
                H,
                W,
                tall,
                broad,
                stride_rb,
                stride_rc,
                stride_rh,
                stride_rw,
                C,
                PLACES,
            )
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
            first,
            last,
            BLOCK_N,
            CP,
            CLASSES,
            BLOCK_N,
            BLOCK_K,
            PARTS,
        )
        tl.debug_barrier()
        complete = True
        if SHARED:
            complete = tl.atomic_add(arrived + slot, 1, sem="acq_rel", scope="gpu") == shares - 1
        if complete:
            if SHARED:
                tl.store(arrived + slot, 0)
            for start in tl.range(0, count, ROWS, disable_licm=True):
                some = start + tl.arange(0, ROWS)
                winner = recheck_rows(
                    pooled + some * CP,
                    1,
                    tl.load(margins + some, mask=some < count, other=-2.0),
                    tl.load(margins + BLOCK_N + some),
                    minima,
                    exact,
                    bounds,
                    slot,
                    some,
                    BLOCK_N,
                    K,
                    channels,
                    tiles,
                    COSINE,
                    CP,
                    CLASSES,
                    MEMBERS,
                    ROWS,
                    BLOCK_C,
                    CHUNK,
                )
                found = block * BLOCK_N + some
                image, token = found // (h * w), found % (h * w)
                at = indices + image.to(tl.int64) * stride_ib + begin + token
                tl.store(at, winner.to(tl.int64), mask=some < count)
            if INPUTS:
                for skipped in tl.range(0, channels, BLOCK_P, disable_licm=True):
                    part = skipped + tl.arange(0, BLOCK_P)
                    means = pooled_rows(
                        reconstruction,
                        row,
                        part,
                        rows,
                        h,
                        w,
                        H,
                        W,
                        tall,
                        broad,
                        stride_fb,
                        stride_fc,
                        stride_fh,
                        stride_fw,
                        C,
                        PLACES,
                    )
                    store_rows(inputs, means, row, part, rows, h * w, stride_nb, stride_nt, stride_nc, C)
        tl.debug_barrier()  # before the next block's rows take the place of these
