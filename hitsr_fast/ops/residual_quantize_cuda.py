"""CUDA C++ backend of `residual_quantize` and `residual_decode`: csrc/cuda, one kernel for all scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hitsr_fast.backends import triton_unavailable
from hitsr_fast.ops.packed_codebook import LAYOUT, pack_eager, pack_triton
from hitsr_fast.reference.residual_quantize import DecodeCall, QuantizeCall

CHANNELS = (8, 16, 32, 64)
PARTS = ("mean", "codes", "half_norms", "exact", "bounds")
READ_BY_FOURS = ("codes", "half_norms", "exact")
MAX_SCALES = 32
MIN_CAPABILITY = (8, 0)
_BUSY = 0.5  # share of multiprocessors at work from which on this is expected to be the quicker one


def quantize_unsupported(*args: Any) -> str | None:
    """Why a call of `residual_quantize` with such arguments cannot run here, or None."""
    call = QuantizeCall(*args)
    if call.metric != "l2":
        return f"needs metric l2, found {call.metric}"
    if call.layout == LAYOUT:
        for name, part in zip(PARTS, call.parts, strict=True):
            if name in READ_BY_FOURS and part.data_ptr() % 16:
                return f"needs {name} of the prepared codebook aligned to 16 bytes"
    return _unsupported(call, call.z.shape[2:])


def decode_unsupported(*args: Any) -> str | None:
    """As `quantize_unsupported`, of `residual_decode`."""
    call = DecodeCall(*args)
    return _unsupported(call, call.size)


def _unsupported(call: QuantizeCall | DecodeCall, size: Sequence[int]) -> str | None:
    device, C = call.codebook.device, call.codebook.shape[1]
    if C not in CHANNELS:
        return f"needs C of {', '.join(map(str, CHANNELS))}, found {C}"
    if len(call.scales) > 2 * MAX_SCALES:
        return f"needs at most {MAX_SCALES} scales, found {len(call.scales) // 2}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"needs compute capability 8.0, found {'.'.join(map(str, capability))}"
    ranks, limit = _plan(call, size)
    needs = "needs the residual of an image in shared memory"
    return f"{needs}: {(C, *size)} does not fit into {limit} bytes" if ranks == 0 else None


def _plan(call: QuantizeCall | DecodeCall, size: Sequence[int]) -> tuple[int, int]:
    """Blocks that share an image, 0 where it does not fit, and bytes that each of them may have."""
    device, C = call.codebook.device, call.codebook.shape[1]
    plan: tuple[int, int] = torch.ops.hitsr_fast._residual_quantize_cuda_plan(
        device.index, C, *size, list(call.scales)
    )
    return plan


def quantize_leaves_idle(*args: Any) -> bool:
    """Whether a call of `residual_quantize` has too few images: an image has one or two multiprocessors.

    They take about a millisecond for HIT-VAR's scales, however few they are, where Triton's kernels spread
    each scale over the whole chip. That half of the multiprocessors is where both take as long is a
    prediction; `python -m benchmarks run residual_quantize` on a GPU shows both.
    """
    call = QuantizeCall(*args)
    return _idle(call, call.z.shape[0], call.z.shape[2:])


def decode_leaves_idle(*args: Any) -> bool:
    """As `quantize_leaves_idle`, of `residual_decode`."""
    call = DecodeCall(*args)
    return _idle(call, call.indices.shape[0], call.size)


def _idle(call: QuantizeCall | DecodeCall, batch: int, size: Sequence[int]) -> bool:
    count = torch.cuda.get_device_properties(call.codebook.device).multi_processor_count
    return batch * _plan(call, size)[0] < _BUSY * count


def pack_phi(phi_weight: Tensor) -> Tensor:
    """`(P, C, C, 3, 3)` as float32 `(P, 9, C / 4, C, 4)`: of a tap, four inputs of each output channel."""
    P, C = phi_weight.shape[:2]
    packed = phi_weight.new_empty((P, 3, 3, C // 4, C, 4), dtype=torch.float32)
    packed.copy_(phi_weight.unflatten(2, (C // 4, 4)).permute(0, 4, 5, 2, 1, 3))
    return packed.flatten(1, 2)


def residual_quantize_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.residual_quantize`, with the order of sums of csrc/cuda/residual_quantize."""
    call = QuantizeCall(*args)
    packed: Sequence[Tensor] = call.parts
    if call.layout != LAYOUT:
        pack = pack_triton if triton_unavailable() is None else pack_eager
        packed = pack(call.codebook, call.metric)[1]
    z = call.z.to(torch.float32).contiguous()
    return _run(call, z, packed, call.replay, z.shape[0], z.shape[2:])


def residual_decode_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.residual_decode`: the same kernel with nothing to search, so with the same bits."""
    call = DecodeCall(*args)
    out = _run(call, None, (), call.indices, call.indices.shape[0], call.size)
    reconstruction, _, pooled, reconstructions = out
    return reconstruction, pooled, reconstructions


def _run(
    call: QuantizeCall | DecodeCall,
    z: Tensor | None,
    packed: Sequence[Tensor],
    replay: Tensor | None,
    batch: int,
    size: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.hitsr_fast._residual_quantize_cuda(
        *(z, call.codebook.float().contiguous(), list(packed)),
        *(pack_phi(call.phi_weight), call.phi_bias.float().contiguous()),
        *(list(call.scales), list(call.phi_index), call.phi_ratio),
        None if replay is None else replay.contiguous(),
        *(batch, list(size), call.inputs, call.per_scale),
    )
    return outputs
