"""The first kernel of a scale: the residual pooled, and the nearest code of each of its rows."""

import triton
import triton.language as tl

from ..nearest_code.recheck import recheck_rows
from ..nearest_code.rows import screened_rows
from ..nearest_code.screen import screen_tiles
from .pool import pooled_rows, store_rows


@triton.jit(do_not_specialize=["rows", "begin", "h", "w", "H", "W", "tall", "broad", "share"])
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
):
    """indices (B, T) of a scale, from `begin` on: the nearest codes of area(residual (B, C, H, W), (h, w)).

    INPUTS: inputs (B, h w, C) = area(reconstruction (B, C, H, W), (h, w)) as well. mean, codes, half_norms,
    exact and bounds are the packed codebook of `nearest_code`, whose stages these are: a screen that leaves
    a minimum for each class of codes, and a re-check of the classes that may hold the nearest.
    A program takes blocks of rows, and `share` tiles of codes. SHARED: several programs share the tiles of a
    block, there are as many as blocks, and the last to arrive re-checks; `arrived` (blocks,) is 0 before and
    after. For the programs of a block minima (tiles, BLOCK_N, CLASSES), pooled (BLOCK_N, CP) and margins
    (2, BLOCK_N) lie between the stages.
    """
    slot = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tiles)
    member, channel = tl.arange(0, BLOCK_N), tl.arange(0, CP)
    pooled += slot * (BLOCK_N * CP)
    margins += slot * (2 * BLOCK_N)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_N), tl.num_programs(0)):
        row = block * BLOCK_N + member
        means = pooled_rows(
            residual,
            row,
            channel,
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
        )
        values = tl.trans(means)
        kept, back, slack, near = screened_rows(values, mean, bounds, channel, COSINE, C, CP)
        code = codes + (first.to(tl.int64) * (PARTS * BLOCK_K) + tl.arange(0, BLOCK_K))[None, :] * CP
        least = minima + ((slot * tiles + first) * BLOCK_N + member[:, None]) * CLASSES
        screen_tiles(
            kept,
            -back[:, None],
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
        complete = True
        if SHARED:
            tl.debug_barrier()  # all of this program's minima, before it says so
            order = tl.atomic_add(arrived + slot, 1, sem="acq_rel", scope="gpu")
            complete = order == tl.num_programs(1) - 1
        if complete:
            tl.store(pooled + member[:, None] * CP + channel[None, :], values)
            tl.store(margins + member, tl.where(row < rows, slack, -2.0))
            tl.store(margins + BLOCK_N + member, near)
            if SHARED:
                tl.store(arrived + slot, 0)
            tl.debug_barrier()
            for start in range(0, BLOCK_N, ROWS):
                some = start + tl.arange(0, ROWS)
                winner = recheck_rows(
                    pooled + some * CP,
                    1,
                    tl.load(margins + some),
                    tl.load(margins + BLOCK_N + some),
                    minima,
                    exact,
                    bounds,
                    slot,
                    some,
                    BLOCK_N,
                    K,
                    C,
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
                tl.store(at, winner.to(tl.int64), mask=found < rows)
            if INPUTS:
                means = pooled_rows(
                    reconstruction,
                    row,
                    channel,
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
                )
                store_rows(inputs, means, row, channel, rows, h * w, stride_nb, stride_nt, stride_nc, C)
            tl.debug_barrier()  # before another block's rows take the place of these
