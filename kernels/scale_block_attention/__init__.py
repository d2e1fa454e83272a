"""Triton kernels of `scale_block_attention` and `cached_attention`; docs/ops/scale_block_attention.md."""

from .backward import (
    _scale_block_attention_delta_kernel,
    _scale_block_attention_dkdv_kernel,
    _scale_block_attention_dq_kernel,
)
from .forward import (
    _cached_attention_combine_kernel,
    _cached_attention_kernel,
    _scale_block_attention_fwd_kernel,
)

__all__ = [
    "_cached_attention_combine_kernel",
    "_cached_attention_kernel",
    "_scale_block_attention_delta_kernel",
    "_scale_block_attention_dkdv_kernel",
    "_scale_block_attention_dq_kernel",
    "_scale_block_attention_fwd_kernel",
]
