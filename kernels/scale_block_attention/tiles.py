"""Tiles of rows of attention tensors (B, T, NH, D): where they lie, loads and stores."""

import triton
import triton.language as tl


@triton.jit
def head_offset(stride_b, stride_h):
    """Of the first row of the program's head: axis 2 of the grid is the image, axis 1 the head."""
    return tl.program_id(2).to(tl.int64) * stride_b + tl.program_id(1).to(tl.int64) * stride_h


@triton.jit
def tile_offsets(stride_t, stride_d, ROWS: tl.constexpr, DP: tl.constexpr):
    """Of the values of a tile (ROWS, DP) from its first."""
    row = tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, DP).to(tl.int64)
    return row[:, None] * stride_t + column[None, :] * stride_d


@triton.jit
def load_tile(at, D: tl.constexpr, DP: tl.constexpr):
    """Values of whole rows, zeros in the columns from D to DP."""
    if D == DP:
        return tl.load(at)
    else:
        return tl.load(at, mask=(tl.arange(0, DP) < D)[None, :], other=0.0)


@triton.jit
def load_partial_tile(at, inside, D: tl.constexpr, DP: tl.constexpr):
    """The same with zeros in the rows that are not inside (ROWS,)."""
    if D == DP:
        return tl.load(at, mask=inside[:, None], other=0.0)
    else:
        return tl.load(at, mask=inside[:, None] & (tl.arange(0, DP) < D)[None, :], other=0.0)


@triton.jit
def store_tile(out, values, first, count, T, NH, D: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr):
    """Rows [first, count) of values (ROWS, DP) to the program's head of out (B, T, NH, D), contiguous."""
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, DP)
    start = (tl.program_id(2).to(tl.int64) * T + row) * NH + tl.program_id(1)
    inside = (row < count)[:, None] & (column < D)[None, :]
    tl.store(out + start[:, None] * D + column[None, :], values.to(out.dtype.element_ty), mask=inside)
