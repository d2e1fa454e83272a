"""Definition of what stands before each convolution of the autoencoder: group norm, then SiLU."""

from __future__ import annotations

import torch
from torch import Tensor


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """`y / (1 + exp(-y))` of `y = (x - mean) / sqrt(var + eps) * weight + bias`, in the `memory_format` of x.

    Arguments and result are those of `ops.group_norm_silu`.
    """
    wide = any(tensor.dtype == torch.float64 for tensor in (x, weight, bias))
    values, factor, offset = (t.to(torch.float64 if wide else torch.float32) for t in (x, weight, bias))
    # In a row, for PyTorch sums rows pairwise and is exact for large maps only there.
    parts = values.contiguous().flatten(2).unflatten(1, (groups, -1)).flatten(2)
    centred = parts - parts.mean(2, keepdim=True)
    normal = centred * (centred.square().mean(2, keepdim=True) + eps).rsqrt()
    y = normal.view(x.shape) * factor[:, None, None] + offset[:, None, None]
    out: Tensor = (y * y.sigmoid()).to(x.dtype).contiguous(memory_format=memory_format(x))
    return out


def memory_format(x: Tensor) -> torch.memory_format:
    """That of the result: channels-last where the channels of x `(B, C, H, W)` lie side by side."""
    _, C, H, W = x.shape
    return torch.channels_last if C > 1 and H * W > 1 and x.stride(1) == 1 else torch.contiguous_format
