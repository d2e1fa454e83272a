"""Triton kernels of `modulated_layer_norm` and `gated_residual`; docs/ops/modulated_layer_norm.md."""

from .norm import _modulated_layer_norm_bwd_kernel, _modulated_layer_norm_fwd_kernel
from .residual import _gated_residual_bwd_kernel, _gated_residual_fwd_kernel

__all__ = [
    "_gated_residual_bwd_kernel",
    "_gated_residual_fwd_kernel",
    "_modulated_layer_norm_bwd_kernel",
    "_modulated_layer_norm_fwd_kernel",
]
