"""Definition of what stands before each convolution of the autoencoder: group norm, then SiLU."""

from __future__ import annotations

import torch
from torch import Tensor


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`y / (1 + exp(-y))` of `y = (x - mean) / sqrt(var + eps) * weight + bias`, in the `memory_format` of x.

    Returns:
        out: that of `ops.group_norm_silu`.
        mean, rstd: `(B, groups)` float32 (float64 for float64 input), of each group, and one over its
            deviation; of a map without pixels 0 and `1 / sqrt(eps)`.
    """
    values, factor, offset = _wide(x, weight, bias)
    parts = _groups_of(values, groups)
    count = max(parts.shape[2], 1)
    mean = parts.sum(2) / count
    centred = parts - mean[..., None]
    rstd = (centred.square().sum(2) / count + eps).rsqrt()
    normal = (centred * rstd[..., None]).view(x.shape)
    y = normal * factor[:, None, None] + offset[:, None, None]
    out: Tensor = (y * y.sigmoid()).to(x.dtype).contiguous(memory_format=memory_format(x))
    return out, mean, rstd


def group_norm_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in x, in its `memory_format`, and in weight and bias `(C,)`, each in the dtype of its own.

    With n the normalised values, y = n weight + bias, s = 1 / (1 + exp(-y)), G = grad s (1 + y (1 - s)) and
    H = G weight: dx = rstd (H - mean(H) - n mean(H n)), means over a group, dweight = sum of G n, dbias = sum
    of G, sums over images and pixels.
    """
    given, values, factor, offset = _wide(grad, x, weight, bias)
    groups = mean.shape[1]
    normal = ((_groups_of(values, groups) - mean[..., None]) * rstd[..., None]).view(x.shape)
    y = normal * factor[:, None, None] + offset[:, None, None]
    s = y.sigmoid()
    outer = given.contiguous() * (s * (1 + y * (1 - s)))
    inner = _groups_of(outer * factor[:, None, None], groups)
    part = _groups_of(normal, groups)
    grad_x = inner - inner.mean(2, keepdim=True) - part * (inner * part).mean(2, keepdim=True)
    grad_x = (grad_x * rstd[..., None]).view(x.shape).to(x.dtype)
    grad_x = grad_x.contiguous(memory_format=memory_format(x))
    grad_weight, grad_bias = (t.flatten(2).sum((0, 2)) for t in (outer * normal, outer))
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def memory_format(x: Tensor) -> torch.memory_format:
    """That of the result: channels-last where the channels of x `(B, C, H, W)` lie side by side."""
    _, C, H, W = x.shape
    return torch.channels_last if C > 1 and H * W > 1 and x.stride(1) == 1 else torch.contiguous_format


def _groups_of(x: Tensor, groups: int) -> Tensor:
    """`(B, groups, values of a group)`, in a row: PyTorch sums rows pairwise and is exact for large maps only
    there.
    """
    parts: Tensor = x.contiguous().flatten(2).unflatten(1, (groups, -1)).flatten(2)
    return parts


def _wide(*tensors: Tensor) -> list[Tensor]:
    """All in float32, or in float64 where one is."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(dtype) for t in tensors]
