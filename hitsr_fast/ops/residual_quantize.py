"""`residual_quantize`, `residual_decode` and `residual_step`: the multi-scale residual quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

import hitsr_fast.reference.residual_quantize as reference
from hitsr_fast.dispatch import Backend, register, register_autograd, register_no_gradient
from hitsr_fast.ops import nearest_code_cpu
from hitsr_fast.ops import residual_quantize_cpu as cpu
from hitsr_fast.ops.nearest_code import Metric
from hitsr_fast.ops.validation import (
    FLOATING,
    INDEX,
    check_choice,
    check_finite,
    check_index_range,
    check_shape,
    check_tensor,
)


class ResidualQuantized(NamedTuple):
    """What `residual_quantize` returns."""

    indices: Tensor
    reconstruction: Tensor


def residual_quantize(
    z: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    *,
    scales: Sequence[int | tuple[int, int]],
    phi_index: Sequence[int],
    phi_ratio: float = 0.5,
    replay: Tensor | None = None,
    metric: Metric = "l2",
) -> ResidualQuantized:
    """Quantize a latent from coarse to fine, each scale coding what the earlier ones left over.

    From the residual R = z, for each scale s in order: `i_s = nearest_code(area(R))`,
    `f = phi_s(bicubic(codebook[i_s]))`, `reconstruction += f`, `R -= f`, where
    `phi(h) = (1 - r) h + r (conv3x3(h) + bias)`. A scale of the size of the map is not resampled.

    Args:
        z: float16, bfloat16, float32 or float64, `(B, C, H, W)`.
        codebook: floating, `(K, C)`, finite.
        phi_weight: dtype of the codebook, `(P, C, C, 3, 3)`.
        phi_bias: dtype of the codebook, `(P, C)`.
        scales: side or (h, w) of each scale, none larger than the map.
        phi_index: which phi each scale uses, from 0 to P - 1; `phi_table` gives VAR's choice.
        phi_ratio: r, from 0 to 1; 0 leaves phi out.
        replay: int64 `(B, T0)`, codes of the first scales that are taken instead of searched, or None. T0
            must end where a scale ends.
        metric: of `nearest_code`.

    Returns:
        indices: int64 `(B, T)`, scale after scale, each row-major; T is the sum of h * w.
        reconstruction: `(B, C, H, W)` in the codebook's dtype, float32 where that is a 16-bit one.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape, device, scale, index or ratio does not fit, or the codebook is not finite.

    Notes:
        Arithmetic runs in the dtype of the reconstruction; the search is exact (see `nearest_code`).
        Gradient: of the reconstruction, in codebook, phi_weight and phi_bias. None in z: a straight-through
        estimate is the caller's choice.
        Backends: cpu (float32 arithmetic; the compiled search), reference.
        Source: VAR (arXiv 2404.02905), Algorithm 1; replay: HIT-VAR (arXiv 2506.04990), Algorithm 1.

    Example:
        >>> z = torch.tensor([[[[1.0, 1.0], [1.0, 2.0]]]])
        >>> codebook = torch.tensor([[0.0], [1.0]])
        >>> weight, bias = torch.zeros(1, 1, 1, 3, 3), torch.zeros(1, 1)
        >>> out = residual_quantize(z, codebook, weight, bias, scales=[1, 2], phi_index=[0, 0], phi_ratio=0.0)
        >>> out.indices
        tensor([[1, 0, 0, 0, 1]])
        >>> out.reconstruction
        tensor([[[[1., 1.],
                  [1., 2.]]]])
    """
    check_tensor("z", z, FLOATING)
    check_shape("z", z, "B C H W")
    _check_bank(codebook, phi_weight, phi_bias, like=z)
    check_shape("codebook", codebook, "K C", C=z.shape[1])
    flat = _flat_scales(scales, z.shape[2:])
    _check_phi(phi_index, phi_ratio, len(scales), phi_weight.shape[0])
    check_choice("metric", metric, get_args(Metric))
    if replay is not None:
        check_tensor("replay", replay, INDEX, like=z)
        check_shape("replay", replay, "B T0", B=z.shape[0])
        ends = [0, *_scale_ends(flat)]
        if replay.shape[1] not in ends:
            raise ValueError(f"replay: expected T0 to be one of {ends}, found {replay.shape[1]}")
    reconstruction, indices = torch.ops.hitsr_fast.residual_quantize(
        z, codebook, phi_weight, phi_bias, flat, list(phi_index), phi_ratio, replay, metric
    )
    return ResidualQuantized(indices, reconstruction)


def residual_decode(
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    *,
    scales: Sequence[int | tuple[int, int]],
    phi_index: Sequence[int],
    size: Sequence[int],
    phi_ratio: float = 0.5,
) -> Tensor:
    """Reconstruction from the codes of some first scales: `sum_s phi_s(bicubic(codebook[i_s]))`.

    Args:
        indices: int64 `(B, T0)`, as `residual_quantize` gives them.
        codebook: floating, `(K, C)`.
        phi_weight: dtype of the codebook, `(P, C, C, 3, 3)`.
        phi_bias: dtype of the codebook, `(P, C)`.
        scales: side or (h, w) of each of the scales that `indices` holds.
        phi_index: which phi each of them uses.
        size: (H, W) of the result.
        phi_ratio: r of phi, from 0 to 1.

    Returns:
        `(B, C, H, W)` in the codebook's dtype, float32 where that is a 16-bit one.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape, device, scale, index or ratio does not fit.

    Notes:
        Equals the reconstruction of `residual_quantize` bit for bit, given its indices and the same backend.
        Gradient: in codebook, phi_weight and phi_bias.
        Backends: reference.
        Source: VAR (arXiv 2404.02905), Algorithm 2.

    Example:
        >>> indices = torch.tensor([[1, 0, 0, 0, 1]])
        >>> codebook = torch.tensor([[0.0], [1.0]])
        >>> weight, bias = torch.zeros(1, 1, 1, 3, 3), torch.zeros(1, 1)
        >>> residual_decode(
        ...     indices, codebook, weight, bias, scales=[1, 2], phi_index=[0, 0], size=(2, 2), phi_ratio=0.0
        ... )
        tensor([[[[1., 1.],
                  [1., 2.]]]])
    """
    check_tensor("indices", indices, INDEX)
    _check_bank(codebook, phi_weight, phi_bias, like=indices)
    size = _pair("size", size)
    flat = _flat_scales(scales, size)
    _check_phi(phi_index, phi_ratio, len(scales), phi_weight.shape[0])
    check_shape("indices", indices, "B T0", T0=_scale_ends(flat)[-1])
    out: Tensor = torch.ops.hitsr_fast.residual_decode(
        indices, codebook, phi_weight, phi_bias, flat, list(phi_index), size, phi_ratio
    )
    return out


def residual_step(
    reconstruction: Tensor,
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    *,
    scale: int | tuple[int, int],
    next_scale: int | tuple[int, int] | None,
    phi_ratio: float = 0.5,
) -> Tensor:
    """The sampler's step: add one scale's codes to the reconstruction in place, pool it for the next scale.

    `reconstruction += phi(bicubic(codebook[indices]))`; the result is `area(reconstruction)`.

    Args:
        reconstruction: `(B, C, H, W)` in the codebook's dtype, float32 where that is a 16-bit one; changed.
        indices: int64 `(B, h * w)`.
        codebook: floating, `(K, C)`.
        phi_weight: dtype of the codebook, `(C, C, 3, 3)`: the phi of this scale.
        phi_bias: dtype of the codebook, `(C,)`.
        scale: side or (h, w) of this scale.
        next_scale: side or (h2, w2) of the next one; None after the last.
        phi_ratio: r of phi, from 0 to 1.

    Returns:
        `(B, C, h2, w2)`, a tensor of its own; `(B, C, 0, 0)` where next_scale is None.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape, device, scale, index or ratio does not fit.
        RuntimeError: an argument asks for a gradient; the step has none.

    Notes:
        Steps over all scales leave what `residual_decode` returns, bit for bit on the same backend.
        Backends: reference.
        Source: VAR (arXiv 2404.02905), Algorithm 2.

    Example:
        >>> reconstruction = torch.zeros(1, 1, 2, 2)
        >>> phi = (torch.zeros(1, 1, 3, 3), torch.zeros(1))
        >>> indices, codebook = torch.tensor([[1]]), torch.tensor([[0.0], [1.0]])
        >>> residual_step(reconstruction, indices, codebook, *phi, scale=1, next_scale=2, phi_ratio=0.0)
        tensor([[[[1., 1.],
                  [1., 1.]]]])
    """
    check_tensor("codebook", codebook, FLOATING)
    check_shape("codebook", codebook, "K C")
    C = codebook.shape[1]
    check_tensor("reconstruction", reconstruction, (reference.arithmetic_dtype(codebook),), like=codebook)
    check_shape("reconstruction", reconstruction, "B C H W", C=C)
    check_tensor("phi_weight", phi_weight, (codebook.dtype,), like=codebook)
    if tuple(phi_weight.shape) != (C, C, 3, 3):
        raise ValueError(f"phi_weight: expected shape {(C, C, 3, 3)}, found {tuple(phi_weight.shape)}")
    check_tensor("phi_bias", phi_bias, (codebook.dtype,), like=codebook)
    check_shape("phi_bias", phi_bias, "C", C=C)
    _check_ratio(phi_ratio)
    flat = _flat_scales([scale], reconstruction.shape[2:])
    flat_next = [0, 0] if next_scale is None else _flat_scales([next_scale], reconstruction.shape[2:])
    check_tensor("indices", indices, INDEX, like=codebook)
    check_shape("indices", indices, "B L", B=reconstruction.shape[0], L=flat[0] * flat[1])
    inputs = (reconstruction, codebook, phi_weight, phi_bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise RuntimeError("residual_step: has no gradient; call it under torch.no_grad()")
    pooled: Tensor = torch.ops.hitsr_fast.residual_step(
        reconstruction, indices, codebook, phi_weight, phi_bias, flat, flat_next, phi_ratio
    )
    return pooled


def _pair(name: str, size: int | Sequence[int]) -> list[int]:
    pair = [size, size] if isinstance(size, int) else list(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name}: expected a side or (height, width) of at least 1, found {size}")
    return pair


def _flat_scales(scales: Sequence[int | tuple[int, int]], size: Sequence[int]) -> list[int]:
    """`[h0, w0, h1, w1, ...]`, checked against the map's (H, W)."""
    if not scales:
        raise ValueError("scales: expected at least one, found none")
    flat: list[int] = []
    for scale in scales:
        h, w = _pair("scales", scale)
        if h > size[0] or w > size[1]:
            raise ValueError(f"scales: expected at most the map's {tuple(size)}, found {(h, w)}")
        flat += [h, w]
    return flat


def _scale_ends(flat: Sequence[int]) -> list[int]:
    """Number of tokens up to the end of each scale."""
    return list(accumulate(h * w for h, w in zip(flat[::2], flat[1::2], strict=True)))


def _check_bank(codebook: Tensor, phi_weight: Tensor, phi_bias: Tensor, like: Tensor) -> None:
    check_tensor("codebook", codebook, FLOATING, like=like)
    check_shape("codebook", codebook, "K C")
    K, C = codebook.shape
    if K == 0 or C == 0:
        raise ValueError(f"codebook: expected K and C of at least 1, found shape {(K, C)}")
    check_tensor("phi_weight", phi_weight, (codebook.dtype,), like=like)
    if phi_weight.dim() != 5 or tuple(phi_weight.shape[1:]) != (C, C, 3, 3):
        raise ValueError(f"phi_weight: expected shape (P, {C}, {C}, 3, 3), found {tuple(phi_weight.shape)}")
    check_tensor("phi_bias", phi_bias, (codebook.dtype,), like=like)
    check_shape("phi_bias", phi_bias, "P C", P=phi_weight.shape[0], C=C)


def _check_phi(phi_index: Sequence[int], phi_ratio: float, num_scales: int, num_phi: int) -> None:
    if len(phi_index) != num_scales:
        raise ValueError(
            f"phi_index: expected an entry for each of {num_scales} scales, found {len(phi_index)}"
        )
    if min(phi_index) < 0 or max(phi_index) >= num_phi:
        raise ValueError(f"phi_index: expected entries from 0 to {num_phi - 1}, found {list(phi_index)}")
    _check_ratio(phi_ratio)


def _check_ratio(phi_ratio: float) -> None:
    if not 0 <= phi_ratio <= 1:
        raise ValueError(f"phi_ratio: expected 0 to 1, found {phi_ratio}")


def _check_quantize(z: Tensor, codebook: Tensor, *rest: Any) -> None:
    check_finite("codebook", codebook)
    replay = rest[5]
    if replay is not None:
        check_index_range("replay", replay, codebook.shape[0])


def _check_decode(indices: Tensor, codebook: Tensor, *_rest: Any) -> None:
    check_index_range("indices", indices, codebook.shape[0])


def _check_step(reconstruction: Tensor, indices: Tensor, codebook: Tensor, *_rest: Any) -> None:
    check_index_range("indices", indices, codebook.shape[0])


def _quantize_fake(
    z: Tensor, codebook: Tensor, phi_weight: Tensor, phi_bias: Tensor, scales: list[int], *_rest: Any
) -> tuple[Tensor, Tensor]:
    indices = z.new_empty((z.shape[0], _scale_ends(scales)[-1]), dtype=torch.int64)
    return z.new_empty(z.shape, dtype=reference.arithmetic_dtype(codebook)), indices


def _decode_fake(
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    scales: list[int],
    phi_index: list[int],
    size: list[int],
    phi_ratio: float,
) -> Tensor:
    shape = (indices.shape[0], codebook.shape[1], *size)
    return codebook.new_empty(shape, dtype=reference.arithmetic_dtype(codebook))


def _backward_fake(
    grad: Tensor, indices: Tensor, codebook: Tensor, phi_weight: Tensor, *_rest: Any
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


def _quantize_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, codebook, phi_weight, _, ctx.scales, ctx.phi_index, ctx.phi_ratio, _, _ = inputs
    ctx.save_for_backward(output[1], codebook, phi_weight)


def _quantize_backward(ctx: Any, grad: Tensor, _grad_indices: None) -> tuple[Tensor | None, ...]:
    return (None, *_bank_grads(ctx, grad), None, None, None, None, None)


def _decode_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    indices, codebook, phi_weight, _, ctx.scales, ctx.phi_index, _, ctx.phi_ratio = inputs
    ctx.save_for_backward(indices, codebook, phi_weight)


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (None, *_bank_grads(ctx, grad), None, None, None, None)


def _bank_grads(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    indices, codebook, phi_weight = ctx.saved_tensors
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.hitsr_fast.residual_decode_backward(
        grad, indices, codebook, phi_weight, ctx.scales, ctx.phi_index, ctx.phi_ratio
    )
    return grads


register(
    "residual_quantize(Tensor z, Tensor codebook, Tensor phi_weight, Tensor phi_bias, int[] scales, "
    "int[] phi_index, float phi_ratio, Tensor? replay, str metric) -> (Tensor, Tensor)",
    backends=[
        Backend("cpu", cpu.residual_quantize_cpu, cpu.supports, nearest_code_cpu.available),
        Backend("reference", reference.residual_quantize),
    ],
    fake=_quantize_fake,
    check=_check_quantize,
)
register(
    "residual_decode(Tensor indices, Tensor codebook, Tensor phi_weight, Tensor phi_bias, int[] scales, "
    "int[] phi_index, SymInt[] size, float phi_ratio) -> Tensor",
    backends=[Backend("reference", reference.residual_decode)],
    fake=_decode_fake,
    check=_check_decode,
)
register(
    "residual_decode_backward(Tensor grad, Tensor indices, Tensor codebook, Tensor phi_weight, int[] scales, "
    "int[] phi_index, float phi_ratio) -> (Tensor, Tensor, Tensor)",
    backends=[Backend("reference", reference.residual_decode_backward)],
    fake=_backward_fake,
)
register(
    "residual_step(Tensor(a!) reconstruction, Tensor indices, Tensor codebook, Tensor phi_weight, "
    "Tensor phi_bias, int[] scale, int[] next_scale, float phi_ratio) -> Tensor",
    backends=[Backend("reference", reference.residual_step)],
    fake=_step_fake,
    check=_check_step,
)
register_autograd("residual_quantize", _quantize_backward, _quantize_context)
register_autograd("residual_decode", _decode_backward, _decode_context)
register_no_gradient("residual_decode_backward", "second derivatives are not implemented")
