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
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if tensors[0].device.type != "cpu":
        return f"needs CPU tensors, found {tensors[0].device.type}"
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "needs float16, bfloat16 or float32, found float64"
    return None


def modulated_layer_norm_cpu(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.modulated_layer_norm`."""
    (rows,) = _rows(x)
    out, mean, rstd = _LIBRARY._modulated_layer_norm(rows, _wide(scale), _wide(shift), eps, chosen_isa())
    return out.to(x.dtype), mean, rstd


def modulated_layer_norm_backward_cpu(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.modulated_layer_norm_backward`."""
    grad_x, grad_scale, grad_shift = _LIBRARY._modulated_layer_norm_backward(
        *_rows(grad, x), _wide(scale), mean.contiguous(), rstd.contiguous(), chosen_isa()
    )
    return grad_x.to(x.dtype), grad_scale.to(scale.dtype), grad_shift.to(scale.dtype)


def gated_residual_cpu(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """As `reference.gated_residual`."""
    out: Tensor = _LIBRARY._gated_residual(*_rows(x, y), _wide(gate), chosen_isa())
    return out.to(x.dtype)


def gated_residual_backward_cpu(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.gated_residual_backward`."""
    grad_y, grad_gate = _LIBRARY._gated_residual_backward(*_rows(grad, y), _wide(gate), chosen_isa())
    return grad_y.to(y.dtype), grad_gate.to(gate.dtype)


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Contiguous, of one dtype that the kernels take: bfloat16 if all are, else float32."""
    half = all(tensor.dtype == torch.bfloat16 for tensor in tensors)
    dtype = torch.bfloat16 if half else torch.float32
    return [tensor.to(dtype).contiguous() for tensor in tensors]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()
