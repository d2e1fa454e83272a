"""Triton kernels of `nearest_code`: a screen on the tensor cores, and the exact re-check of what it leaves.

docs/ops/nearest_code.md derives the bounds, hitsr_fast/ops/nearest_code_triton.py packs and launches.
"""

from .recheck import _nearest_code_recheck_kernel
from .screen import _nearest_code_screen_kernel

__all__ = ["_nearest_code_recheck_kernel", "_nearest_code_screen_kernel"]
