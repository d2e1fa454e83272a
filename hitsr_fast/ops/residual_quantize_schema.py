"""Schemas of the residual quantizer's ops, their fakes and gradients, and the backends to choose from."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import hitsr_fast.reference.residual_quantize as reference
from hitsr_fast.backends import UP_TO_FLOAT32, Launch, Native, NativeCuda
from hitsr_fast.checks import check_index_range
from hitsr_fast.dispatch import Gradient, op
from hitsr_fast.ops import residual_decode_backward_cuda as backward_cuda
from hitsr_fast.ops import residual_decode_backward_triton as backward_triton
from hitsr_fast.ops import residual_quantize_cuda as cuda
from hitsr_fast.ops import residual_quantize_triton as triton
from hitsr_fast.ops.nearest_code import check_codebook, packed_cpu
from hitsr_fast.reference.residual_quantize import DecodeCall, QuantizeCall, arithmetic_dtype

_OPTIONS: dict[str, Any] = {"dtypes": UP_TO_FLOAT32, "any_dtype": ("z",)}


def scale_ends(flat: Sequence[int]) -> list[int]:
    """Number of tokens up to the end of each scale of `[h0, w0, h1, w1, ...]`."""
    return list(accumulate(h * w for h, w in zip(flat[::2], flat[1::2], strict=True)))


def _check_quantize(*args: Any) -> None:
    call = QuantizeCall(*args)
    check_codebook(call.codebook, call.layout)
    if call.replay is not None:
        check_index_range("replay", call.replay, call.codebook.shape[0])


def _check_indices(indices: Tensor, codebook: Tensor, *_rest: Any) -> None:
    check_index_range("indices", indices, codebook.shape[0])


def _save(
    kind: type[QuantizeCall] | type[DecodeCall], ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    """What the gradient needs. One that nobody asks for is None rather than zeros as large as the maps."""
    call, (*_, pooled, reconstructions) = kind(*inputs), output
    indices, ctx.others = output[1], [None] * len(call[4:])
    if isinstance(call, QuantizeCall):
        ctx.others[0] = [None] * len(call.parts)
    else:
        indices = call.indices
    ctx.save_for_backward(indices, call.codebook, call.phi_weight)
    ctx.walk, ctx.maps = (call.scales, call.phi_index, call.phi_ratio), reconstructions.shape
    ctx.mark_non_differentiable(pooled)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
    """Of the codebook and the phis, from those of the reconstruction and, last, the reconstructions."""
    grad_per_scale, bank = grads[-1], (None, None, None)
    given = grad if grad is not None else grad_per_scale
    if given is not None:
        if grad is None:
            grad = given.new_zeros(ctx.maps[1:])
        if grad_per_scale is None:
            grad_per_scale = given.new_empty((0, *ctx.maps[1:]))
        bank = decode_backward(grad, grad_per_scale, *ctx.saved_tensors, *ctx.walk)
    return None, *bank, *ctx.others


def _reference(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return reference.residual_quantize(*args[:4], *args[6:])  # without what is packed


def _cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = QuantizeCall(*args)
    isa, parts = packed_cpu(call.codebook, call.parts, call.layout, call.metric)
    out: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.hitsr_fast._residual_quantize(
        call.z.float() if call.z.dtype == torch.float64 else call.z,
        *(call.codebook, call.phi_weight, call.phi_bias, parts),
        *(call.scales, call.phi_index, call.phi_ratio, call.replay),
        *(call.metric == "cosine", call.inputs, call.per_scale),
        isa,
    )
    return out


@op(
    "residual_quantize(Tensor z, Tensor codebook, Tensor phi_weight, Tensor phi_bias, Tensor[] parts, "
    "str layout, int[] scales, int[] phi_index, float phi_ratio, Tensor? replay, str metric, bool inputs, "
    "bool per_scale) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    cuda=NativeCuda(
        cuda.residual_quantize_cuda,
        **_OPTIONS,
        unless=cuda.quantize_unsupported,
        rather=cuda.quantize_leaves_idle,
    ),
    triton=Launch(triton.residual_quantize_triton, **_OPTIONS, limits=triton.LIMITS),
    native=Native("_residual_quantize", run=_cpu, **_OPTIONS, limits=triton.LIMITS),
    check=_check_quantize,
    gradient=Gradient(functools.partial(_save, QuantizeCall), _gradient),
)
def quantize(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = QuantizeCall(*args)
    indices = call.z.new_empty((call.z.shape[0], scale_ends(call.scales)[-1]), dtype=torch.int64)
    reconstruction, pooled, reconstructions = _maps(call, call.z.shape)
    return reconstruction, indices, pooled, reconstructions


@op(
    "residual_decode(Tensor indices, Tensor codebook, Tensor phi_weight, Tensor phi_bias, int[] scales, "
    "int[] phi_index, SymInt[] size, float phi_ratio, bool inputs, bool per_scale) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.residual_decode,
    cuda=NativeCuda(
        cuda.residual_decode_cuda,
        **_OPTIONS,
        unless=cuda.decode_unsupported,
        rather=cuda.decode_leaves_idle,
    ),
    triton=Launch(triton.residual_decode_triton, **_OPTIONS, limits=triton.LIMITS),
    native=Native("_residual_decode", **_OPTIONS, limits=triton.LIMITS),
    check=_check_indices,
    gradient=Gradient(functools.partial(_save, DecodeCall), _gradient),
)
def decode(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = DecodeCall(*args)
    return _maps(call, (call.indices.shape[0], call.codebook.shape[1], *call.size))


def _maps(call: QuantizeCall | DecodeCall, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Fakes of reconstruction, inputs, reconstructions."""
    ends, dtype = scale_ends(call.scales), arithmetic_dtype(call.codebook)
    rows = ends[-1] - ends[0] if call.inputs else 0
    return (
        call.codebook.new_empty(tuple(shape), dtype=dtype),
        call.codebook.new_empty((shape[0], rows, shape[1]), dtype=dtype),
        call.codebook.new_empty((len(ends) if call.per_scale else 0, *shape), dtype=dtype),
    )


@op(
    "residual_decode_backward(Tensor grad, Tensor grad_per_scale, Tensor indices, Tensor codebook, "
    "Tensor phi_weight, int[] scales, int[] phi_index, float phi_ratio) -> (Tensor, Tensor, Tensor)",
    reference=reference.residual_decode_backward,
    cuda=NativeCuda(
        backward_cuda.residual_decode_backward_cuda,
        dtypes=UP_TO_FLOAT32,
        unless=backward_cuda.backward_unsupported,
    ),
    triton=Launch(backward_triton.residual_decode_backward_triton, limits=triton.LIMITS),
    native=Native("_residual_decode_backward", dtypes=UP_TO_FLOAT32, limits=triton.LIMITS),
)
def decode_backward(
    grad: Tensor, grad_per_scale: Tensor, indices: Tensor, codebook: Tensor, phi_weight: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    new = phi_weight.new_empty
    return codebook.new_empty(codebook.shape), new(phi_weight.shape), new(phi_weight.shape[:2])


@op(
    "residual_step(Tensor(a!) reconstruction, Tensor indices, Tensor codebook, Tensor phi_weight, "
    "Tensor phi_bias, int[] scale, int[] next_scale, float phi_ratio) -> Tensor",
    reference=reference.residual_step,
    triton=Launch(triton.residual_step_triton, limits=triton.LIMITS),
    native=Native("_residual_step", dtypes=UP_TO_FLOAT32, limits=triton.LIMITS),
    check=lambda _reconstruction, *rest: _check_indices(*rest),
)
def step(reconstruction: Tensor, *rest: Any) -> Tensor:
    *_, next_scale, _phi_ratio = rest
    return reconstruction.new_empty(*reconstruction.shape[:2], *next_scale)
