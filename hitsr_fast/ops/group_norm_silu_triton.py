"""Triton backend of `group_norm_silu`: launches the kernels of kernels/group_norm_silu."""

from __future__ import annotations

import torch
from torch import Tensor

from hitsr_fast.backends import MAX_GRID, Limit, cdiv
from hitsr_fast.reference.group_norm_silu import memory_format

LIMITS = (Limit("B", 0, MAX_GRID),)
MAX_WIDTH = 4096  # channels of a group; those of one tile lie in a program's registers
_VALUES = 4096  # of a tile
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def unsupported(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> str | None:
    """Why a call with such arguments cannot run here, or None."""
    width = x.shape[1] // groups
    return f"needs at most {MAX_WIDTH} channels in a group, found {width}" if width > MAX_WIDTH else None


def tile_of(channels: int, channels_last: bool) -> dict[str, int]:
    """Pixels and channels of a tile; those that lie side by side are as many as make wide loads."""
    across = min(32 if channels_last else 8, 1 << (channels - 1).bit_length())
    return {"PIXELS": _VALUES // across, "CHANNELS": across}


def group_norm_silu_triton(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.group_norm_silu`."""
    from hitsr_fast.kernels.group_norm_silu import (
        _group_norm_apply_kernel,
        _group_norm_join_kernel,
        _group_norm_moments_kernel,
    )

    layout = memory_format(x)
    x = x.contiguous(memory_format=layout)
    out = torch.empty_like(x, memory_format=layout)
    (B, C), P, channels_last = x.shape[:2], x.shape[2] * x.shape[3], layout == torch.channels_last
    tile = tile_of(C, channels_last)
    blocks = cdiv(P, tile["PIXELS"])
    width = 1 << (C // groups - 1).bit_length()
    strides = (C * P, 1, C) if channels_last else (C * P, P, 1)
    mean, rstd = (torch.empty(B, groups, dtype=torch.float32, device=x.device) for _ in range(2))
    if out.numel() == 0:
        return out, mean.zero_(), rstd.fill_(eps**-0.5)
    moments = torch.empty(B, blocks, 2, C, dtype=torch.float32, device=x.device)
    grid = (blocks, cdiv(C, tile["CHANNELS"]), B)
    _group_norm_moments_kernel[grid](x, moments, P, strides, C=C, **tile, **_OPTIONS)
    _group_norm_join_kernel[groups, B](
        moments, mean, rstd, P, eps, C=C, GROUPS=groups, PIXELS=tile["PIXELS"],
        BLOCKS=max(_VALUES // 2 // width, 1), WIDTH=width, **_OPTIONS,
    )  # fmt: skip
    _group_norm_apply_kernel[grid](
        x, weight, bias, mean, rstd, out, P, strides, weight.stride(), bias.stride(),
        C=C, GROUPS=groups, **tile, **_OPTIONS,
    )  # fmt: skip
    return out, mean, rstd


def group_norm_silu_backward_triton(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.group_norm_silu_backward`."""
    from hitsr_fast.kernels.group_norm_silu import _group_norm_slope_kernel, _group_norm_sums_kernel

    layout = memory_format(x)
    x, grad = (t.contiguous(memory_format=layout) for t in (x, grad))
    mean, rstd = mean.contiguous(), rstd.contiguous()
    grad_x = torch.empty_like(x, memory_format=layout)
    if grad_x.numel() == 0:
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias)
    (B, C), P, channels_last = x.shape[:2], x.shape[2] * x.shape[3], layout == torch.channels_last
    groups, tile = mean.shape[1], tile_of(C, channels_last)
    blocks = cdiv(P, tile["PIXELS"])
    strides = (C * P, 1, C) if channels_last else (C * P, P, 1)
    grid = (blocks, cdiv(C, tile["CHANNELS"]), B)
    shared = x, grad, weight, bias, mean, rstd
    rest = P, strides, weight.stride(), bias.stride()
    options = {"C": C, "GROUPS": groups, **tile, **_OPTIONS}
    parts = torch.empty(B, blocks, 2, C, dtype=torch.float32, device=x.device)
    _group_norm_sums_kernel[grid](*shared, parts, *rest, **options)
    sums = parts.sum(1)
    # Of what goes on through the weight, a group's means: plain, and with the normalised values.
    means = (sums * weight.float()).unflatten(2, (groups, -1)).sum(3) / (P * (C // groups))
    _group_norm_slope_kernel[grid](*shared, means, grad_x, *rest, **options)
    of_bias, of_weight = sums.sum(0)
    return grad_x, of_weight.to(weight.dtype, copy=True), of_bias.to(bias.dtype, copy=True)
