"""Triton kernels of `nearest_code`: rows in float16, a screen on tensor cores, and a re-check.

docs/ops/nearest_code.md derives the bounds, hitsr_fast/ops/nearest_code_triton.py packs and launches.
"""

from .recheck import _nearest_code_recheck_kernel
from .screen import _nearest_code_round_kernel, _nearest_code_screen_kernel

__all__ = ["_nearest_code_recheck_kernel", "_nearest_code_round_kernel", "_nearest_code_screen_kernel"]
