"""The multi-scale residual quantizer: encode, encode a pyramid of targets, decode, and the sampler's step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hitsr_fast.checks import (
    FLOATING,
    INDEX,
    INTEGER,
    check_choice,
    check_number,
    check_own_memory,
    check_shape,
    check_tensor,
    has_values,
)
from hitsr_fast.ops import residual_quantize_schema as schema
from hitsr_fast.ops.nearest_code import METRICS, Metric, PreparedCodebook, check_not_empty, prepare_codebook
from hitsr_fast.pyramid import Scale, size_of
from hitsr_fast.reference.residual_quantize import arithmetic_dtype


class ResidualQuantized(NamedTuple):
    """What `residual_quantize` returns; see there."""

    indices: Tensor
    reconstruction: Tensor
    inputs: Tensor | None
    reconstructions: Tensor | None


class TokenizedPyramid(NamedTuple):
    """What `tokenize_pyramid` returns; see there."""

    indices: Tensor
    reconstructions: list[Tensor]


class ResidualDecoded(NamedTuple):
    """What `residual_decode` returns; see there."""

    reconstruction: Tensor
    inputs: Tensor | None
    reconstructions: Tensor | None


def residual_quantize(
    z: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    *,
    scales: Sequence[Scale],
    phi_index: Sequence[int],
    phi_ratio: float = 0.5,
    replay: Tensor | None = None,
    metric: Metric = "l2",
    prepared: PreparedCodebook | None = None,
    return_inputs: bool = False,
    per_scale: bool = False,
    inputs: bool | None = None,
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
        prepared: what `prepare_codebook` made of this codebook for this metric; spares packing it anew.
        return_inputs: also return the inputs of the next scales.
        per_scale: also return the reconstruction after each scale.
        inputs: the former name of `return_inputs`, deprecated.

    Returns:
        indices: int64 `(B, T)`, scale after scale, each row-major; T is the sum of h * w.
        reconstruction: `(B, C, H, W)` in the codebook's dtype, float32 where that is a 16-bit one.
        inputs: `(B, T - h0 * w0, C)`, for each scale but the first the reconstruction after the scale before,
            pooled to its size, as rows: what teacher forcing feeds to the model. None if not asked for.
        reconstructions: `(S, B, C, H, W)`; the last equals the reconstruction. None if not asked for.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape, device, scale, index or ratio does not fit; on the CPU, the codebook is not
            finite, or `prepared` was made of another one (elsewhere no value is looked at).

    Notes:
        Arithmetic runs in the dtype of the reconstruction. The order of sums is each backend's own; given the
        residual that the backend has pooled, the search is exact (see `nearest_code`).
        Gradient: of the reconstruction and the reconstructions, in codebook, phi_weight and phi_bias. None in
        z: a straight-through estimate is the caller's choice. None of the inputs.
        Backends: cuda, triton, cpu (all in float32; float64 goes to the last), reference.
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
    return_inputs = _renamed(inputs, return_inputs)
    check_bank(codebook, phi_weight, phi_bias)
    flat = _check_latent("z", z, codebook, scales)
    _check_phi(phi_index, phi_ratio, len(scales), phi_weight.shape[0])
    check_choice("metric", metric, METRICS)
    if replay is not None:
        check_tensor("replay", replay, INDEX, like=z)
        check_shape("replay", replay, "B T0", B=z.shape[0])
        ends = [0, *schema.scale_ends(flat)]
        if replay.shape[1] not in ends:
            raise ValueError(f"replay: expected T0 to be one of {ends}, found {replay.shape[1]}")
    reconstruction, indices, pooled, reconstructions = schema.quantize(
        *(z, codebook, phi_weight, phi_bias, *_unpack(prepared, codebook, metric)),
        *(flat, list(phi_index), phi_ratio, replay, metric, return_inputs, per_scale),
    )
    return ResidualQuantized(
        indices, reconstruction, pooled if return_inputs else None, reconstructions if per_scale else None
    )


def tokenize_pyramid(
    latents: Sequence[Tensor],
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    *,
    scales: Sequence[Scale],
    target_steps: Sequence[int],
    phi_index: Sequence[Sequence[int]],
    phi_ratio: float = 0.5,
    metric: Metric = "l2",
    prepared: PreparedCodebook | None = None,
) -> TokenizedPyramid:
    """Quantize one latent a target, from coarse to fine, each continuing the codes of the one before.

    Target n is `residual_quantize` of its latent over the first `target_steps[n]` scales, with the codes of
    target n - 1 as replay. On the CPU the codebook is packed once for all of them.

    Args:
        latents: `(B, C, H_n, W_n)` of each target, dtypes as for `residual_quantize`; they may be fewer than
            the targets, whose rest is then left out.
        scales: side or (h, w) of each scale; those of a target no larger than its latent.
        target_steps: number of scales up to the end of each target, increasing.
        phi_index: for each target, which phi each of its scales uses.
        codebook, phi_weight, phi_bias, phi_ratio, metric, prepared: as for `residual_quantize`.

    Returns:
        indices: int64 `(B, T)`, those of the last target; the codes of each target are a prefix.
        reconstructions: `(B, C, H_n, W_n)` of each target.

    Raises:
        TypeError, ValueError: as `residual_quantize`; ValueError also where the targets do not fit.

    Notes:
        Gradient and backends: see `residual_quantize`.
        Source: HIT-VAR (arXiv 2506.04990), Algorithm 1.

    Example:
        >>> latents = [torch.tensor([[[[1.0]]]]), torch.tensor([[[[1.0, 1.0], [1.0, 2.0]]]])]
        >>> codebook = torch.tensor([[0.0], [1.0]])
        >>> phi = (torch.zeros(1, 1, 1, 3, 3), torch.zeros(1, 1))
        >>> targets = {"scales": [1, 2], "target_steps": [1, 2], "phi_index": [[0], [0, 0]]}
        >>> tokenize_pyramid(latents, codebook, *phi, **targets, phi_ratio=0.0).indices
        tensor([[1, 0, 0, 0, 1]])
    """
    check_bank(codebook, phi_weight, phi_bias)
    _check_targets(latents, scales, target_steps, phi_index)
    check_choice("metric", metric, METRICS)
    if prepared is None and codebook.device.type == "cpu" and has_values(codebook):
        prepared = prepare_codebook(codebook, metric=metric)
    packed = _unpack(prepared, codebook, metric)
    indices: Tensor | None = None
    reconstructions = []
    for target, latent in enumerate(latents):
        steps = target_steps[target]
        flat = _check_latent(f"latents[{target}]", latent, codebook, scales[:steps])
        _check_phi(phi_index[target], phi_ratio, steps, phi_weight.shape[0])
        if latent.shape[0] != latents[0].shape[0]:
            raise ValueError(
                f"latents[{target}]: expected a batch of {latents[0].shape[0]}, found {latent.shape[0]}"
            )
        reconstruction, indices, _, _ = schema.quantize(
            *(latent, codebook, phi_weight, phi_bias, *packed),
            *(flat, list(phi_index[target]), phi_ratio, indices, metric, False, False),
        )
        reconstructions.append(reconstruction)
    assert indices is not None  # there is at least one latent
    return TokenizedPyramid(indices, reconstructions)


def residual_decode(
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    *,
    scales: Sequence[Scale],
    phi_index: Sequence[int],
    size: int | Sequence[int],
    phi_ratio: float = 0.5,
    return_inputs: bool = False,
    per_scale: bool = False,
    inputs: bool | None = None,
) -> ResidualDecoded:
    """Reconstruction from the codes of some first scales: `sum_s phi_s(bicubic(codebook[i_s]))`.

    Args:
        indices: int64 `(B, T0)`, as `residual_quantize` gives them.
        scales, phi_index: of each of the scales that `indices` holds.
        size: side or (H, W) of the result.
        codebook, phi_weight, phi_bias, phi_ratio, return_inputs, per_scale, inputs: as for
            `residual_quantize`.

    Returns:
        As of `residual_quantize`: reconstruction `(B, C, H, W)`, inputs `(B, T0 - h0 * w0, C)` and
        reconstructions `(S, B, C, H, W)`, the last two None if not asked for.

    Raises:
        TypeError, ValueError: as `residual_quantize`.

    Notes:
        Given the indices of `residual_quantize`, its results up to the order of sums; bit for bit on the
        reference. Gradient and backends: as there.
        Source: VAR (arXiv 2404.02905), Algorithm 2.

    Example:
        >>> indices = torch.tensor([[1, 0, 0, 0, 1]])
        >>> codebook = torch.tensor([[0.0], [1.0]])
        >>> weight, bias = torch.zeros(1, 1, 1, 3, 3), torch.zeros(1, 1)
        >>> out = residual_decode(
        ...     indices, codebook, weight, bias, scales=[1, 2], phi_index=[0, 0], size=2, phi_ratio=0.0
        ... )
        >>> out.reconstruction
        tensor([[[[1., 1.],
                  [1., 2.]]]])
    """
    return_inputs = _renamed(inputs, return_inputs)
    check_bank(codebook, phi_weight, phi_bias)
    size = list(size_of("size", tuple(size) if isinstance(size, Iterable) else size))
    flat = _flat_scales(scales, size)
    _check_phi(phi_index, phi_ratio, len(scales), phi_weight.shape[0])
    check_tensor("indices", indices, INDEX, like=codebook)
    check_shape("indices", indices, "B T0", T0=schema.scale_ends(flat)[-1])
    reconstruction, pooled, reconstructions = schema.decode(
        *(indices, codebook, phi_weight, phi_bias),
        *(flat, list(phi_index), size, phi_ratio, return_inputs, per_scale),
    )
    return ResidualDecoded(
        reconstruction, pooled if return_inputs else None, reconstructions if per_scale else None
    )


def residual_step(
    reconstruction: Tensor,
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    *,
    scale: Scale,
    next_scale: Scale | None,
    phi_ratio: float = 0.5,
) -> Tensor:
    """The sampler's step: add one scale's codes to the reconstruction in place, pool it for the next scale.

    `reconstruction += phi(bicubic(codebook[indices]))`; the result is `area(reconstruction)`.

    Args:
        reconstruction: `(B, C, H, W)` in the codebook's dtype, float32 where that is a 16-bit one; changed.
        indices: int64 `(B, h * w)`.
        codebook, phi_ratio: as for `residual_quantize`.
        phi_weight, phi_bias: the phi of this scale, `(C, C, 3, 3)` and `(C,)`, dtype of the codebook.
        scale: side or (h, w) of this scale.
        next_scale: side or (h2, w2) of the next one; None after the last.

    Returns:
        `(B, C, h2, w2)`, a tensor of its own; `(B, C, 0, 0)` where next_scale is None.

    Raises:
        TypeError, ValueError: as `residual_quantize`.
        RuntimeError: an argument asks for a gradient; the step has none.

    Notes:
        Steps over all scales leave what `residual_decode` returns, up to the order of sums; on the reference
        bit for bit.
        Backends: triton, cpu, reference.
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
    check_tensor("reconstruction", reconstruction, (arithmetic_dtype(codebook),), like=codebook)
    check_shape("reconstruction", reconstruction, "B C H W", C=C)
    check_own_memory("reconstruction", reconstruction)
    check_tensor("phi_weight", phi_weight, (codebook.dtype,), like=codebook)
    if tuple(phi_weight.shape) != (C, C, 3, 3):
        raise ValueError(f"phi_weight: expected shape {(C, C, 3, 3)}, found {tuple(phi_weight.shape)}")
    check_tensor("phi_bias", phi_bias, (codebook.dtype,), like=codebook)
    check_shape("phi_bias", phi_bias, "C", C=C)
    check_number("phi_ratio", phi_ratio, 0, 1)
    flat = _flat_scales([scale], reconstruction.shape[2:])
    flat_next = [0, 0] if next_scale is None else _flat_scales([next_scale], reconstruction.shape[2:])
    check_tensor("indices", indices, INDEX, like=codebook)
    check_shape("indices", indices, "B L", B=reconstruction.shape[0], L=flat[0] * flat[1])
    pooled: Tensor = schema.step(
        reconstruction, indices, codebook, phi_weight, phi_bias, flat, flat_next, phi_ratio
    )
    return pooled


def _renamed(inputs: bool | None, return_inputs: bool) -> bool:
    if inputs is None:
        return return_inputs
    if return_inputs:
        raise ValueError(f"inputs: expected no other name beside return_inputs, found {inputs}")
    if not torch.compiler.is_compiling():  # which cannot trace a warning
        warnings.warn("inputs: renamed to return_inputs", DeprecationWarning, stacklevel=3)
    return inputs


def _unpack(prepared: PreparedCodebook | None, codebook: Tensor, metric: Metric) -> tuple[list[Tensor], str]:
    """Parts and layout of a prepared codebook, checked against the codebook that it should be made of."""
    if prepared is None:
        return [], ""
    if not isinstance(prepared, PreparedCodebook):
        raise TypeError(f"prepared: expected a PreparedCodebook, found {type(prepared).__name__}")
    if prepared.metric != metric:
        raise ValueError(f"prepared: expected one for metric {metric}, found one for {prepared.metric}")
    check_tensor("prepared", prepared.codebook, (codebook.dtype,), like=codebook)
    K, C = codebook.shape
    check_shape("prepared", prepared.codebook, "K C", K=K, C=C)
    look = codebook.device.type == "cpu" and has_values(codebook, prepared.codebook)
    if look and not torch.equal(codebook, prepared.codebook):
        raise ValueError("prepared: expected the values of codebook, found others: prepare it anew")
    return list(prepared.parts), prepared.layout


def _flat_scales(scales: Sequence[Scale], size: Sequence[int]) -> list[int]:
    """`[h0, w0, h1, w1, ...]`, checked against the map's (H, W)."""
    if not isinstance(scales, Sequence) or not scales:
        raise ValueError(f"scales: expected at least one, in a sequence, found {scales!r}")
    flat: list[int] = []
    for scale in scales:
        h, w = size_of("scales", scale)
        if h > size[0] or w > size[1]:
            raise ValueError(f"scales: expected at most the map's {tuple(size)}, found {(h, w)}")
        flat += [h, w]
    return flat


def _check_latent(name: str, z: Tensor, codebook: Tensor, scales: Sequence[Scale]) -> list[int]:
    """The flat scales of a latent that fits them and the codebook."""
    check_tensor(name, z, FLOATING, like=codebook)
    check_shape(name, z, "B C H W", C=codebook.shape[1])
    return _flat_scales(scales, z.shape[2:])


def _check_targets(
    latents: Sequence[Tensor],
    scales: Sequence[Scale],
    target_steps: Sequence[int],
    phi_index: Sequence[Sequence[int]],
) -> None:
    steps = list(target_steps)
    if steps != sorted(set(steps)) or not 1 <= min(steps, default=0) <= max(steps, default=0) <= len(scales):
        raise ValueError(f"target_steps: expected increasing numbers from 1 to {len(scales)}, found {steps}")
    if len(phi_index) != len(steps):
        wanted = f"a list for each of {len(steps)} targets"
        raise ValueError(f"phi_index: expected {wanted}, found {len(phi_index)}")
    if not 1 <= len(latents) <= len(steps):
        raise ValueError(f"latents: expected 1 to {len(steps)} maps, found {len(latents)}")


def check_bank(codebook: Tensor, phi_weight: Tensor, phi_bias: Tensor) -> None:
    """Raise TypeError or ValueError unless these are a codebook `(K, C)` and P phis for it."""
    check_tensor("codebook", codebook, FLOATING)
    check_shape("codebook", codebook, "K C")
    check_not_empty(codebook)
    C = codebook.shape[1]
    check_tensor("phi_weight", phi_weight, (codebook.dtype,), like=codebook)
    if phi_weight.dim() != 5 or tuple(phi_weight.shape[1:]) != (C, C, 3, 3):
        raise ValueError(f"phi_weight: expected shape (P, {C}, {C}, 3, 3), found {tuple(phi_weight.shape)}")
    check_tensor("phi_bias", phi_bias, (codebook.dtype,), like=codebook)
    check_shape("phi_bias", phi_bias, "P C", P=phi_weight.shape[0], C=C)


def _check_phi(phi_index: Sequence[int], phi_ratio: float, num_scales: int, num_phi: int) -> None:
    if not isinstance(phi_index, Sequence):
        raise TypeError(f"phi_index: expected a sequence of integers, found {phi_index!r}")
    for entry in phi_index:
        if not isinstance(entry, INTEGER):
            raise TypeError(f"phi_index: expected integers, found {list(phi_index)}")
    if len(phi_index) != num_scales:
        raise ValueError(
            f"phi_index: expected an entry for each of {num_scales} scales, found {len(phi_index)}"
        )
    if min(phi_index) < 0 or max(phi_index) >= num_phi:
        raise ValueError(f"phi_index: expected entries from 0 to {num_phi - 1}, found {list(phi_index)}")
    check_number("phi_ratio", phi_ratio, 0, 1)
