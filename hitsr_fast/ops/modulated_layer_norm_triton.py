"""Triton backend of the ops of modulated_layer_norm.py: launches kernels/modulated_layer_norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hitsr_fast.backends import MAX_GRID, Limit, cdiv

MAX_CHANNELS = 8192  # a row lies in one program's registers
LIMITS = (Limit("C", 2, MAX_CHANNELS), Limit("B", 0, MAX_GRID))
_ROWS = 16  # of which a program of a backward pass stores one sum


def constants(channels: int) -> dict[str, Any]:
    """Block size and options for rows of so many channels."""
    block = max(1 << (channels - 1).bit_length(), 32)
    warps = min(max(block // 256, 1), 16)
    return {"C": channels, "BLOCK": block, "num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}


def modulated_layer_norm_triton(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.modulated_layer_norm`."""
    from hitsr_fast.kernels.modulated_layer_norm import _modulated_layer_norm_fwd_kernel

    B, L, C = x.shape
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean, rstd = (torch.empty(B, L, dtype=torch.float32, device=x.device) for _ in range(2))
    if out.numel() > 0:
        _modulated_layer_norm_fwd_kernel[(L, B)](
            x, scale, shift, out, mean, rstd, L, eps,
            x.stride(), scale.stride(), shift.stride(), **constants(C),
        )  # fmt: skip
    return out, mean, rstd


def modulated_layer_norm_backward_triton(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.modulated_layer_norm_backward`."""
    from hitsr_fast.kernels.modulated_layer_norm import _modulated_layer_norm_bwd_kernel

    B, L, C = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty(B, cdiv(L, _ROWS), 2, C, dtype=torch.float32, device=x.device)
    if grad_x.numel() > 0:
        _modulated_layer_norm_bwd_kernel[(cdiv(L, _ROWS), B)](
            grad, x, scale, mean.contiguous(), rstd.contiguous(), grad_x, sums, L,
            grad.stride(), x.stride(), scale.stride(), ROWS=_ROWS, **constants(C),
        )  # fmt: skip
    grad_scale, grad_shift = sums.sum(1).unbind(1)
    return grad_x, grad_scale.to(scale.dtype).contiguous(), grad_shift.contiguous()


def gated_residual_triton(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """As `reference.gated_residual`."""
    from hitsr_fast.kernels.modulated_layer_norm import _gated_residual_fwd_kernel

    B, L, C = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() > 0:
        _gated_residual_fwd_kernel[(L, B)](
            x, y, gate, out, L, x.stride(), y.stride(), gate.stride(), **constants(C)
        )
    return out


def gated_residual_norm_triton(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `reference.gated_residual_norm`."""
    from hitsr_fast.kernels.modulated_layer_norm import _gated_residual_norm_kernel

    B, L, C = x.shape
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    if out.numel() > 0:
        _gated_residual_norm_kernel[(L, B)](
            x, y, gate, scale, shift, total, out, L, eps, x.stride(), y.stride(),
            gate.stride(), scale.stride(), shift.stride(), **constants(C),
        )  # fmt: skip
    return total, out


def gated_residual_backward_triton(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.gated_residual_backward`."""
    from hitsr_fast.kernels.modulated_layer_norm import _gated_residual_bwd_kernel

    B, L, C = y.shape
    grad_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    sums = torch.empty(B, cdiv(L, _ROWS), C, dtype=torch.float32, device=y.device)
    if grad_y.numel() > 0:
        _gated_residual_bwd_kernel[(cdiv(L, _ROWS), B)](
            grad, y, gate, grad_y, sums, L,
            grad.stride(), y.stride(), gate.stride(), ROWS=_ROWS, **constants(C),
        )  # fmt: skip
    return grad_y, sums.sum(1).to(gate.dtype)
