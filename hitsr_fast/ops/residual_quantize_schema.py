"""Schemas of the residual quantizer's ops, their fakes and gradients, and the backends to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import hitsr_fast.reference.residual_quantize as reference
from hitsr_fast.checks import check_finite, check_index_range
from hitsr_fast.dispatch import Backend, register, register_autograd, register_no_gradient
from hitsr_fast.ops import nearest_code_cpu
from hitsr_fast.ops import residual_quantize_cpu as cpu
from hitsr_fast.ops import residual_quantize_cuda as cuda
from hitsr_fast.ops import residual_quantize_triton as triton


def scale_ends(flat: Sequence[int]) -> list[int]:
    """Number of tokens up to the end of each scale of `[h0, w0, h1, w1, ...]`."""
    return list(accumulate(h * w for h, w in zip(flat[::2], flat[1::2], strict=True)))


def _check_quantize(z: Tensor, codebook: Tensor, *rest: Any) -> None:
    layout, replay = rest[3], rest[7]
    if not layout:  # else `prepare_codebook` has looked
        check_finite("codebook", codebook)
    if replay is not None:
        check_index_range("replay", replay, codebook.shape[0])


def _check_decode(indices: Tensor, codebook: Tensor, *_rest: Any) -> None:
    check_index_range("indices", indices, codebook.shape[0])


def _check_step(reconstruction: Tensor, indices: Tensor, codebook: Tensor, *_rest: Any) -> None:
    check_index_range("indices", indices, codebook.shape[0])


def _quantize_fake(
    z: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    parts: list[Tensor],
    layout: str,
    scales: list[int],
    phi_index: list[int],
    phi_ratio: float,
    replay: Tensor | None,
    metric: str,
    inputs: bool,
    per_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    indices = z.new_empty((z.shape[0], scale_ends(scales)[-1]), dtype=torch.int64)
    reconstruction, pooled, reconstructions = _maps_fake(z.shape, codebook, scales, inputs, per_scale)
    return reconstruction, indices, pooled, reconstructions


def _decode_fake(
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    scales: list[int],
    phi_index: list[int],
    size: list[int],
    phi_ratio: float,
    inputs: bool,
    per_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (indices.shape[0], codebook.shape[1], *size)
    return _maps_fake(shape, codebook, scales, inputs, per_scale)


def _maps_fake(
    shape: Sequence[int], codebook: Tensor, scales: list[int], inputs: bool, per_scale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction, inputs, reconstructions."""
    ends = scale_ends(scales)
    rows = ends[-1] - ends[0] if inputs else 0
    dtype = reference.arithmetic_dtype(codebook)
    return (
        codebook.new_empty(tuple(shape), dtype=dtype),
        codebook.new_empty((shape[0], rows, shape[1]), dtype=dtype),
        codebook.new_empty((len(ends) if per_scale else 0, *shape), dtype=dtype),
    )


def _backward_fake(
    grad: Tensor, grad_per_scale: Tensor, indices: Tensor, codebook: Tensor, phi_weight: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        codebook.new_empty(codebook.shape),
        phi_weight.new_empty(phi_weight.shape),
        phi_weight.new_empty(phi_weight.shape[:2]),
    )


def _step_fake(
    reconstruction: Tensor,
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    scale: list[int],
    next_scale: list[int],
    phi_ratio: float,
) -> Tensor:
    return reconstruction.new_empty(*reconstruction.shape[:2], *next_scale)


def _quantize_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, codebook, phi_weight, _, parts, _, ctx.scales, ctx.phi_index, ctx.phi_ratio, *_ = inputs
    ctx.parts = len(parts)
    _, indices, pooled, reconstructions = output
    _save(ctx, indices, codebook, phi_weight, pooled, reconstructions)


def _quantize_backward(
    ctx: Any, grad: Tensor | None, _indices: None, _inputs: None, grad_per_scale: Tensor | None
) -> tuple[Tensor | list[None] | None, ...]:
    return (None, *_bank_grads(ctx, grad, grad_per_scale), [None] * ctx.parts, *[None] * 8)


def _decode_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    indices, codebook, phi_weight, _, ctx.scales, ctx.phi_index, _, ctx.phi_ratio, *_ = inputs
    _, pooled, reconstructions = output
    _save(ctx, indices, codebook, phi_weight, pooled, reconstructions)


def _decode_backward(
    ctx: Any, grad: Tensor | None, _inputs: None, grad_per_scale: Tensor | None
) -> tuple[Tensor | None, ...]:
    return (None, *_bank_grads(ctx, grad, grad_per_scale), *[None] * 6)


def _save(
    ctx: Any, indices: Tensor, codebook: Tensor, phi_weight: Tensor, pooled: Tensor, reconstructions: Tensor
) -> None:
    """What the gradient needs. One that nobody asks for is None rather than zeros as large as the maps."""
    ctx.save_for_backward(indices, codebook, phi_weight)
    ctx.maps = reconstructions.shape
    ctx.mark_non_differentiable(pooled)
    ctx.set_materialize_grads(False)


def _bank_grads(
    ctx: Any, grad: Tensor | None, grad_per_scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of codebook, phi_weight and phi_bias."""
    indices, codebook, phi_weight = ctx.saved_tensors
    given = grad if grad is not None else grad_per_scale
    if given is None:
        return None, None, None
    if grad is None:
        grad = given.new_zeros(ctx.maps[1:])
    if grad_per_scale is None:
        grad_per_scale = given.new_empty((0, *ctx.maps[1:]))
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.hitsr_fast.residual_decode_backward(
        grad, grad_per_scale, indices, codebook, phi_weight, ctx.scales, ctx.phi_index, ctx.phi_ratio
    )
    return grads


def _reference(
    z: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    parts: list[Tensor],
    layout: str,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return reference.residual_quantize(z, codebook, phi_weight, phi_bias, *rest)


register(
    "residual_quantize(Tensor z, Tensor codebook, Tensor phi_weight, Tensor phi_bias, Tensor[] parts, "
    "str layout, int[] scales, int[] phi_index, float phi_ratio, Tensor? replay, str metric, bool inputs, "
    "bool per_scale) -> (Tensor, Tensor, Tensor, Tensor)",
    backends=[
        Backend("cuda", cuda.residual_quantize_cuda, cuda.supports, cuda.available),
        Backend("triton", triton.residual_quantize_triton, triton.supports_quantize, triton.available),
        Backend("cpu", cpu.residual_quantize_cpu, cpu.supports, nearest_code_cpu.available),
        Backend("reference", _reference),
    ],
    fake=_quantize_fake,
    check=_check_quantize,
)
register(
    "residual_decode(Tensor indices, Tensor codebook, Tensor phi_weight, Tensor phi_bias, int[] scales, "
    "int[] phi_index, SymInt[] size, float phi_ratio, bool inputs, bool per_scale) "
    "-> (Tensor, Tensor, Tensor)",
    backends=[
        Backend("cuda", cuda.residual_decode_cuda, cuda.supports_decode, cuda.available),
        Backend("triton", triton.residual_decode_triton, triton.supports_decode, triton.available),
        Backend("cpu", cpu.residual_decode_cpu, cpu.supports_decode, nearest_code_cpu.available),
        Backend("reference", reference.residual_decode),
    ],
    fake=_decode_fake,
    check=_check_decode,
)
register(
    "residual_decode_backward(Tensor grad, Tensor grad_per_scale, Tensor indices, Tensor codebook, "
    "Tensor phi_weight, int[] scales, int[] phi_index, float phi_ratio) -> (Tensor, Tensor, Tensor)",
    backends=[Backend("reference", reference.residual_decode_backward)],
    fake=_backward_fake,
)
register(
    "residual_step(Tensor(a!) reconstruction, Tensor indices, Tensor codebook, Tensor phi_weight, "
    "Tensor phi_bias, int[] scale, int[] next_scale, float phi_ratio) -> Tensor",
    backends=[
        Backend("triton", triton.residual_step_triton, triton.supports_step, triton.available),
        Backend("cpu", cpu.residual_step_cpu, cpu.supports_step, nearest_code_cpu.available),
        Backend("reference", reference.residual_step),
    ],
    fake=_step_fake,
    check=_check_step,
)
register_autograd("residual_quantize", _quantize_backward, _quantize_context)
register_autograd("residual_decode", _decode_backward, _decode_context)
register_no_gradient("residual_decode_backward", "second derivatives are not implemented")
