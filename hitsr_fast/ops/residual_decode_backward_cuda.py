"""CUDA C++ backend of `residual_decode_backward`: csrc/cuda, four kernels and a sort."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hitsr_fast.ops.residual_quantize_cuda import CHANNELS, MAX_SCALES, MIN_CAPABILITY, pack_phi

MAX_SIDES = 320  # of a map or a scale, height and width together
_STRIP, _PAD = 6144, 4  # floats of a map's row and channels beside those of a place, in shared memory


def backward_unsupported(
    grad: Tensor,
    _grad_per_scale: Tensor,
    _indices: Tensor,
    codebook: Tensor,
    _phi_weight: Tensor,
    scales: Sequence[int],
    *_rest: object,
) -> str | None:
    """Why a call of `residual_decode_backward` with such arguments cannot run here, or None."""
    C, (H, W) = codebook.shape[1], grad.shape[2:]
    if C not in CHANNELS:
        return f"needs C of {', '.join(map(str, CHANNELS))}, found {C}"
    if len(scales) > 2 * MAX_SCALES:
        return f"needs at most {MAX_SCALES} scales, found {len(scales) // 2}"
    widest = _STRIP // (C + _PAD)
    if widest < W:
        return f"needs W of at most {widest}, found {W}"
    sides = max(map(sum, zip((H, *scales[::2]), (W, *scales[1::2]), strict=True)))
    if sides > MAX_SIDES:
        return f"needs height and width of at most {MAX_SIDES} together, found {sides}"
    capability = torch.cuda.get_device_capability(grad.device)
    if capability < MIN_CAPABILITY:
        return f"needs compute capability 8.0, found {'.'.join(map(str, capability))}"
    return None


def residual_decode_backward_cuda(
    grad: Tensor,
    grad_per_scale: Tensor,
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    scales: Sequence[int],
    phi_index: Sequence[int],
    phi_ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.residual_decode_backward`, with the order of sums of csrc/cuda."""
    indices = indices.clamp(0, codebook.shape[0] - 1)  # as the forward pass takes them
    # Sorted by code, and equal ones by place: the order in which the tokens of a code are summed.
    codes, order = indices.flatten().int().sort(stable=True)
    of_codebook, of_weight, of_bias = torch.ops.hitsr_fast._residual_decode_backward_cuda(
        *(grad.float().contiguous(), grad_per_scale.float().contiguous()),
        *(indices.contiguous(), codes, order, codebook.float().contiguous()),
        *(pack_phi(phi_weight.transpose(1, 2)), list(scales), list(phi_index), phi_ratio),
    )
    return of_codebook.to(codebook.dtype), of_weight.to(phi_weight.dtype), of_bias.to(phi_weight.dtype)
