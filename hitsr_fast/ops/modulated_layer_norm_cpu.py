"""CPU backend of `modulated_layer_norm` and `gated_residual`: csrc/cpu/modulated_layer_norm*.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hitsr_fast.ops.nearest_code_cpu import available, chosen_isa

__all__ = [
    "available",
    "gated_residual_backward_cpu",
    "gated_residual_cpu",
    "modulated_layer_norm_backward_cpu",
    "modulated_layer_norm_cpu",
    "supports",
]

_LIBRARY = torch.ops.hitsr_fast


def supports(*args: Any) -> str | None:
    """Why a call with such arguments cannot run here, or None."""
    if not args[0].is_cpu:
        return f"needs CPU tensors, found {args[0].device.type}"
    for arg in args:
        if (arg.dtype if isinstance(arg, Tensor) else arg) is torch.float64:
            return "needs float16, bfloat16 or float32, found float64"
    return None


def modulated_layer_norm_cpu(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.modulated_layer_norm`."""
    out: tuple[Tensor, Tensor, Tensor] = _LIBRARY._modulated_layer_norm(
        x, scale, shift, eps, out_dtype, chosen_isa()
    )
    return out


def modulated_layer_norm_backward_cpu(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.modulated_layer_norm_backward`."""
    grads: tuple[Tensor, Tensor, Tensor] = _LIBRARY._modulated_layer_norm_backward(*args, chosen_isa())
    return grads


def gated_residual_cpu(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """As `reference.gated_residual`."""
    out: Tensor = _LIBRARY._gated_residual(x, y, gate, chosen_isa())
    return out


def gated_residual_backward_cpu(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.gated_residual_backward`."""
    grads: tuple[Tensor, Tensor] = _LIBRARY._gated_residual_backward(grad, y, gate, chosen_isa())
    return grads
