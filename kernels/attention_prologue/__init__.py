"""Triton kernel of `attention_prologue`; docs/ops/attention_prologue.md."""

from .tokens import _attention_prologue_kernel

__all__ = ["_attention_prologue_kernel"]
