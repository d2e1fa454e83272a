"""Where the rows of `nearest_code` lie in memory."""

import triton
import triton.language as tl


@triton.jit
def row_offsets(group, rows, inner, stride_xg, stride_xo, stride_xn):
    """Of the first channel of rows; row n is place n % inner of block n // inner. group: int64."""
    return (
        group * stride_xg + (rows // inner).to(tl.int64) * stride_xo + (rows % inner).to(tl.int64) * stride_xn
    )
