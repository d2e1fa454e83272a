"""The screen of `nearest_code`: least scores of classes of codes, by one float16 product on tensor cores."""

import triton
import triton.language as tl


@triton.jit
def screen_tiles(
    kept,
    towards,
    code,
    norm,
    out,
    stored,
    first,
    last,
    count,
    CP: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
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
    rounded,
    codes,
    half_norms,
    minima,
    margins,
    count,
    tiles,
    tiles_per_program,
    CP: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
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
