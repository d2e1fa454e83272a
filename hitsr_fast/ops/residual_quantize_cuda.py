"""CUDA C++ backend of `residual_quantize` and `residual_decode`: csrc/cuda, one kernel for all scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hitsr_fast import extension
from hitsr_fast.ops import nearest_code_triton as packing

CODEBOOK_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CHANNELS = (8, 16, 32, 64)
MAX_SCALES = 32
MIN_CAPABILITY = (8, 0)


def available() -> str | None:
    """Why nothing can run on this machine, or None."""
    reason = extension.unavailable("_C_cuda")
    if reason is None and not torch.cuda.is_available():
        return "no CUDA device"
    return reason


def supports(
    z: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    parts: Sequence[Tensor],
    layout: str,
    scales: Sequence[int],
    phi_index: Sequence[int],
    phi_ratio: float,
    replay: Tensor | None,
    metric: str,
    *_rest: Any,
) -> str | None:
    """Why a call with such arguments cannot run here, or None."""
    if metric != "l2":
        return f"needs metric l2, found {metric}"
    return _unsupported("z", z, codebook, scales, z.shape[2:])


def supports_decode(
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    scales: Sequence[int],
    phi_index: Sequence[int],
    size: Sequence[int],
    *_rest: Any,
) -> str | None:
    """As `supports`, of `residual_decode`."""
    return _unsupported("indices", indices, codebook, scales, size)


def _unsupported(
    name: str, tensor: Tensor, codebook: Tensor, scales: Sequence[int], size: Sequence[int]
) -> str | None:
    for each, found in ((name, tensor), ("codebook", codebook)):
        if found.device.type != "cuda":
            return f"needs CUDA tensors, found {each} on {found.device.type}"
    if codebook.dtype not in CODEBOOK_DTYPES:
        dtype = str(codebook.dtype).removeprefix("torch.")
        return f"needs a codebook of float16, bfloat16 or float32, found {dtype}"
    C = codebook.shape[1]
    if C not in CHANNELS:
        return f"needs C of {', '.join(map(str, CHANNELS))}, found {C}"
    if len(scales) > 2 * MAX_SCALES:
        return f"needs at most {MAX_SCALES} scales, found {len(scales) // 2}"
    capability = torch.cuda.get_device_capability(codebook.device)
    if capability < MIN_CAPABILITY:
        return f"needs compute capability 8.0, found {'.'.join(map(str, capability))}"
    ranks, limit = torch.ops.hitsr_fast._residual_quantize_cuda_plan(
        codebook.device.index, C, *size, list(scales)
    )
    if ranks == 0:
        return (
            f"needs the residual of an image in shared memory: {(C, *size)} does not fit into {limit} bytes"
        )
    return None


def pack_phi(phi_weight: Tensor) -> Tensor:
    """`(P, C, C, 3, 3)` as float32 `(P, 9, C / 4, C, 4)`: of a tap, four inputs of each output channel."""
    P, C = phi_weight.shape[:2]
    by_tap = phi_weight.float().permute(0, 3, 4, 2, 1).reshape(P, 9, C // 4, 4, C)
    return by_tap.transpose(3, 4).contiguous()


def residual_quantize_cuda(
    z: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    parts: Sequence[Tensor],
    layout: str,
    scales: Sequence[int],
    phi_index: Sequence[int],
    phi_ratio: float,
    replay: Tensor | None,
    metric: str,
    inputs: bool,
    per_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.residual_quantize`, with the order of sums of csrc/cuda/residual_quantize."""
    packed = tuple(parts) if layout == packing.LAYOUT else packing.prepare(codebook, metric)[1]
    return _run(
        z.to(torch.float32).contiguous(),
        codebook,
        packed,
        phi_weight,
        phi_bias,
        scales,
        phi_index,
        phi_ratio,
        replay,
        z.shape[0],
        z.shape[2:],
        inputs,
        per_scale,
    )


def residual_decode_cuda(
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    scales: Sequence[int],
    phi_index: Sequence[int],
    size: Sequence[int],
    phi_ratio: float,
    inputs: bool,
    per_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.residual_decode`: the same kernel with nothing to search, so with the same bits."""
    reconstruction, _, pooled, reconstructions = _run(
        None,
        codebook,
        (),
        phi_weight,
        phi_bias,
        scales,
        phi_index,
        phi_ratio,
        indices,
        indices.shape[0],
        size,
        inputs,
        per_scale,
    )
    return reconstruction, pooled, reconstructions


def _run(
    z: Tensor | None,
    codebook: Tensor,
    packed: Sequence[Tensor],
    phi_weight: Tensor,
    phi_bias: Tensor,
    scales: Sequence[int],
    phi_index: Sequence[int],
    phi_ratio: float,
    replay: Tensor | None,
    batch: int,
    size: Sequence[int],
    inputs: bool,
    per_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.hitsr_fast._residual_quantize_cuda(
        z,
        codebook.float().contiguous(),
        list(packed),
        pack_phi(phi_weight),
        phi_bias.float().contiguous(),
        list(scales),
        list(phi_index),
        phi_ratio,
        None if replay is None else replay.contiguous(),
        batch,
        list(size),
        inputs,
        per_scale,
    )
    return outputs
