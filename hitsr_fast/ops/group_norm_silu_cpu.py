"""CPU backend of `group_norm_silu`: csrc/cpu/group_norm_silu*.cpp, on the best instruction set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hitsr_fast.ops.nearest_code_cpu import available, chosen_isa

__all__ = ["available", "group_norm_silu_cpu", "supports"]


def supports(x: Tensor, weight: Tensor, bias: Tensor, *_rest: Any) -> str | None:
    """Why a call with such arguments cannot run here, or None."""
    if not x.is_cpu:
        return f"needs CPU tensors, found {x.device.type}"
    if torch.float64 in (x.dtype, weight.dtype, bias.dtype):
        return "needs float16, bfloat16 or float32, found float64"
    return None


def group_norm_silu_cpu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """As `reference.group_norm_silu`."""
    out: Tensor = torch.ops.hitsr_fast._group_norm_silu(x, weight, bias, groups, eps, chosen_isa())
    return out
