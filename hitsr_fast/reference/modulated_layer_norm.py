"""Definition of AdaLN's elementwise parts: the modulated layer norm, the gated residual, and both."""

from __future__ import annotations

import torch
from torch import Tensor


def modulated_layer_norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm without affine part, times `1 + scale` plus `shift`, both `(B, C)`.

    Returns:
        out: that of `ops.modulated_layer_norm`, contiguous.
        mean, rstd: `(B, L)` float32 (float64 for float64 input), of each row, and one over its deviation.
    """
    values, factor, offset = _wide(x, scale, shift)
    mean = values.mean(-1)
    centred = values - mean[..., None]
    centred = centred - centred.mean(-1, keepdim=True)  # what the rounding of the mean left
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    out = centred * rstd[..., None] * (1 + factor[:, None]) + offset[:, None]
    return out.to(out_dtype).contiguous(), mean, rstd


def modulated_layer_norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in x `(B, L, C)` and in scale `(B, C)`, in their dtypes, and in shift `(B, C)`, not rounded.

    With n the normalised rows, G = grad and H = G (1 + scale): dx = rstd (H - mean(H) - n mean(H n)),
    dscale = sum over rows of G n, dshift = sum over rows of G.
    """
    given, values, factor = _wide(grad, x, scale)
    normal = (values - mean[..., None]) * rstd[..., None]
    inner = given * (1 + factor[:, None])
    grad_x = inner - inner.mean(-1, keepdim=True) - normal * (inner * normal).mean(-1, keepdim=True)
    grad_x = (grad_x * rstd[..., None]).to(x.dtype).contiguous()
    return grad_x, (given * normal).sum(1).to(scale.dtype), given.sum(1)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + gate * y` of x, y `(B, L, C)` and gate `(B, C)`, in the dtype of x, contiguous."""
    values, branch, factor = _wide(x, y, gate)
    return (values + factor[:, None] * branch).to(x.dtype).contiguous()


def gated_residual_backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients in y `(B, L, C)` and gate `(B, C)`, in their dtypes; that in x is `grad`."""
    given, branch, factor = _wide(grad, y, gate)
    grad_y = (given * factor[:, None]).to(y.dtype).contiguous()
    return grad_y, (given * branch).sum(1).to(gate.dtype)


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, and `modulated_layer_norm` of its result as it was rounded."""
    total = gated_residual(x, y, gate)
    return total, modulated_layer_norm(total, scale, shift, eps, out_dtype)[0]


def _wide(*tensors: Tensor) -> list[Tensor]:
    """All in float32, or in float64 where one is."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(dtype) for t in tensors]
