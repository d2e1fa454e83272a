"""Triton kernel of `sample_codes`: a program a row. docs/ops/sample_codes.md has the definition."""

from .rows import _sample_codes_kernel

__all__ = ["_sample_codes_kernel"]
