"""Triton kernels of `residual_quantize`, `residual_decode` and `residual_step`: two for each scale.

The search pools the residual and finds codes, the update spreads them over the map; where nothing is
searched, a kernel of its own pools. docs/ops/residual_quantize.md describes them,
hitsr_fast/ops/residual_quantize_triton.py launches them.
"""

from .search import _residual_quantize_pool_kernel, _residual_quantize_search_kernel
from .update import _residual_quantize_update_kernel

__all__ = [
    "_residual_quantize_pool_kernel",
    "_residual_quantize_search_kernel",
    "_residual_quantize_update_kernel",
]
