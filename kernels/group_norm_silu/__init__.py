"""Triton kernels of `group_norm_silu`; docs/ops/group_norm_silu.md."""

from .maps import _group_norm_apply_kernel, _group_norm_join_kernel, _group_norm_moments_kernel

__all__ = ["_group_norm_apply_kernel", "_group_norm_join_kernel", "_group_norm_moments_kernel"]
