"""Definition of the multi-scale residual quantizer: encode, decode, its gradient, and the sampler's step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from hitsr_fast.reference.nearest_code import nearest_code


class QuantizeCall(NamedTuple):
    """The arguments of the op `residual_quantize` by name, in the order of its schema; see below."""

    z: Tensor
    codebook: Tensor
    phi_weight: Tensor
    phi_bias: Tensor
    parts: Sequence[Tensor]
    layout: str
    scales: list[int]
    phi_index: list[int]
    phi_ratio: float
    replay: Tensor | None
    metric: str
    inputs: bool
    per_scale: bool


class DecodeCall(NamedTuple):
    """The same of `residual_decode`."""

    indices: Tensor
    codebook: Tensor
    phi_weight: Tensor
    phi_bias: Tensor
    scales: list[int]
    phi_index: list[int]
    size: list[int]
    phi_ratio: float
    inputs: bool
    per_scale: bool


def nearest_phi(position: float, num_phi: int) -> int:
    """Which of `num_phi` phi convolutions belongs to a position from 0, the first scale, to 1, the last.

    It is the nearest of evenly spaced ticks. Exact ties exist (ten scales: 2 and 7) and fall as float64
    rounds: the ticks must be those of numpy's `linspace` to the last bit. They are computed as there, but not
    by it, for compilers take numpy's arrays for tensors.
    """
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    step = (1 - margin - margin) / max(num_phi - 1, 1)
    ticks = [i * step + margin for i in range(num_phi - 1)] + [1 - margin]
    return min(range(num_phi), key=lambda i: abs(ticks[i] - position))


def phi_table(num_scales: int, num_phi: int = 4) -> list[int]:
    """Which of `num_phi` phi convolutions each scale uses; scale i sits at i / (num_scales - 1).

    Example:
        >>> phi_table(10)
        [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]

    Notes:
        Source: VAR (arXiv 2404.02905), the partially shared phi of its released quantizer.
    """
    if num_scales < 1 or num_phi < 1:
        raise ValueError(f"num_scales, num_phi: expected at least 1, found {num_scales}, {num_phi}")
    if num_scales == 1:
        return [0]
    return [nearest_phi(i / (num_scales - 1), num_phi) for i in range(num_scales)]


def arithmetic_dtype(codebook: Tensor) -> torch.dtype:
    """The dtype in which the quantizer computes: the codebook's, or float32 where that is a 16-bit one."""
    return torch.float32 if codebook.dtype in (torch.float16, torch.bfloat16) else codebook.dtype


def residual_quantize(
    z: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    scales: Sequence[int],
    phi_index: Sequence[int],
    phi_ratio: float,
    replay: Tensor | None,
    metric: str,
    inputs: bool,
    per_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize a latent scale by scale: pool the residual, find codes, spread them out with phi, subtract.

    Arguments are those of `ops.residual_quantize`, but for `scales`, which are `h0, w0, h1, w1, ...` here and
    in all that follows. Results are reconstruction, indices, inputs and reconstructions, as there; without
    rows `(B, 0, C)` and without scales `(0, B, C, H, W)` where they are not asked for.
    """
    dtype = arithmetic_dtype(codebook)
    residual = z.to(dtype, copy=True, memory_format=torch.contiguous_format)
    out = _Accumulator(residual.shape, codebook, scales, inputs, per_scale)
    indices = torch.empty(z.shape[0], _num_tokens(scales), dtype=torch.int64, device=z.device)
    replayed = 0
    if replay is not None:
        replayed = replay.shape[1]
        indices[:, :replayed] = replay
    for size, tokens, phi in _walk(scales, phi_index):
        if tokens.start >= replayed:
            rows = _rows(_pool(residual, size)).reshape(-1, z.shape[1])
            indices[:, tokens] = nearest_code(rows, codebook, metric).view(z.shape[0], size[0] * size[1])
        codes = _gather(indices[:, tokens], codebook, size)
        step = _spread(codes, phi_weight[phi], phi_bias[phi], phi_ratio, z.shape[2:])
        out.add(step)
        residual -= step
    return out.reconstruction, indices, out.inputs, out.reconstructions


def residual_decode(
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
    """What `residual_quantize` makes of the codes that it has found: reconstruction, inputs, reconstructions.

    The reconstruction is the sum of the spread-out codes of the given scales, `(B, C, H, W)` for
    `size = (H, W)`. The order of operations is that of `residual_quantize`: its indices give its results bit
    for bit.
    """
    out = _Accumulator((indices.shape[0], codebook.shape[1], *size), codebook, scales, inputs, per_scale)
    for scale, tokens, phi in _walk(scales, phi_index):
        codes = _gather(indices[:, tokens], codebook, scale)
        out.add(_spread(codes, phi_weight[phi], phi_bias[phi], phi_ratio, size))
    return out.reconstruction, out.inputs, out.reconstructions


def residual_decode_backward(
    grad: Tensor,
    grad_per_scale: Tensor,
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    scales: Sequence[int],
    phi_index: Sequence[int],
    phi_ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in codebook `(K, C)`, phi_weight `(P, C, C, 3, 3)` and phi_bias `(P, C)`.

    `grad` is that of the reconstruction, `(B, C, H, W)`, and `grad_per_scale` that of the reconstructions,
    `(S, B, C, H, W)`, or `(0, B, C, H, W)` where there is none.
    """
    dtype = arithmetic_dtype(codebook)
    B, C, H, W = grad.shape
    grad_codebook = torch.zeros(codebook.shape, dtype=dtype, device=grad.device)
    grad_weight = torch.zeros(phi_weight.shape, dtype=dtype, device=grad.device)
    grad_bias = torch.zeros(phi_weight.shape[:2], dtype=dtype, device=grad.device)
    walk = list(_walk(scales, phi_index))
    for reached, phi, members in _same_gradient(grad.to(dtype), grad_per_scale.to(dtype), phi_index):
        weight = phi_weight[phi].to(dtype)
        grad_h = reached
        if phi_ratio != 0:
            through = conv2d_input(reached.shape, weight, reached, padding=1)
            grad_h = (1 - phi_ratio) * reached + phi_ratio * through
        h = torch.zeros_like(reached)
        for size, tokens, _ in (walk[scale] for scale in members):
            h += _upsample(_gather(indices[:, tokens], codebook, size), (H, W))
            grad_map = grad_h
            if size != (H, W):
                grad_map = torch.ops.aten.upsample_bicubic2d_backward(grad_h, (H, W), (B, C, *size), False)
            grad_codebook.index_add_(0, indices[:, tokens].reshape(-1), _rows(grad_map).reshape(-1, C))
        if phi_ratio != 0:
            grad_weight[phi] += phi_ratio * conv2d_weight(h, weight.shape, reached, padding=1)
            grad_bias[phi] += phi_ratio * len(members) * reached.sum(dim=(0, 2, 3))
    return grad_codebook.to(codebook.dtype), grad_weight.to(phi_weight.dtype), grad_bias.to(phi_weight.dtype)


def _same_gradient(
    grad: Tensor, grad_per_scale: Tensor, phi_index: Sequence[int]
) -> Iterator[tuple[Tensor, int, list[int]]]:
    """Scales that share phi and the gradient that reaches them: the gradient, the phi, their numbers.

    phi is affine, so the maps of such scales may be summed first: each phi costs one pair of convolution
    gradients however many scales use it. A step is part of the reconstructions of its own and of all later
    scales, so with gradients per scale each step has a gradient of its own.
    """
    if grad_per_scale.shape[0] == 0:
        for phi in sorted(set(phi_index)):
            yield grad.contiguous(), phi, [scale for scale, used in enumerate(phi_index) if used == phi]
        return
    for scale in reversed(range(len(phi_index))):
        grad = grad + grad_per_scale[scale]
        yield grad.contiguous(), phi_index[scale], [scale]


def residual_step(
    reconstruction: Tensor,
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    scale: Sequence[int],
    next_scale: Sequence[int],
    phi_ratio: float,
) -> Tensor:
    """Add one scale's codes to `reconstruction` in place; return it pooled to `next_scale`.

    Arguments and result are those of `ops.residual_step`; after the last scale `next_scale` is `(0, 0)`.
    """
    codes = _gather(indices, codebook, scale)
    reconstruction += _spread(codes, phi_weight, phi_bias, phi_ratio, reconstruction.shape[2:])
    if tuple(next_scale) == (0, 0):
        return reconstruction.new_empty(*reconstruction.shape[:2], 0, 0)
    return _pool(reconstruction, next_scale).clone(memory_format=torch.contiguous_format)


class _Accumulator:
    """The reconstruction as it grows, and what is to be kept of it on the way."""

    def __init__(
        self, shape: Sequence[int], codebook: Tensor, scales: Sequence[int], inputs: bool, per_scale: bool
    ) -> None:
        dtype, device = arithmetic_dtype(codebook), codebook.device
        self.reconstruction = torch.zeros(tuple(shape), dtype=dtype, device=device)
        self.reconstructions = self.reconstruction.new_empty(len(scales) // 2 if per_scale else 0, *shape)
        self._following = list(_walk(scales[2:], [0] * (len(scales) // 2 - 1))) if inputs else []
        rows = _num_tokens(scales[2:]) if inputs else 0
        self.inputs = self.reconstruction.new_empty(shape[0], rows, shape[1])
        self._scale = 0

    def add(self, step: Tensor) -> None:
        self.reconstruction += step
        if self.reconstructions.shape[0]:
            self.reconstructions[self._scale] = self.reconstruction
        if self._scale < len(self._following):
            size, tokens, _ = self._following[self._scale]
            self.inputs[:, tokens] = _rows(_pool(self.reconstruction, size))
        self._scale += 1


def _num_tokens(scales: Sequence[int]) -> int:
    return sum(h * w for h, w in zip(scales[::2], scales[1::2], strict=True))


def _walk(scales: Sequence[int], phi_index: Sequence[int]) -> Iterator[tuple[tuple[int, int], slice, int]]:
    """Of each scale: its size (h, w), its slice of the token axis, its phi."""
    start = 0
    for h, w, phi in zip(scales[::2], scales[1::2], phi_index, strict=True):
        yield (h, w), slice(start, start + h * w), phi
        start += h * w


def _pool(x: Tensor, size: Sequence[int]) -> Tensor:
    """Area average of `(B, C, H, W)` to `(B, C, *size)`; the map itself where the sizes match."""
    return x if x.shape[2:] == tuple(size) else F.adaptive_avg_pool2d(x, (size[0], size[1]))


def _rows(x: Tensor) -> Tensor:
    """`(B, C, h, w)` as rows `(B, h * w, C)`."""
    return x.flatten(2).transpose(1, 2)


def _upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bicubic `(B, C, h, w)` to `(B, C, *size)`; the map itself where the sizes match."""
    if x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bicubic", align_corners=False)


def _gather(indices: Tensor, codebook: Tensor, size: Sequence[int]) -> Tensor:
    """Codes of `(B, h * w)` indices as a contiguous map `(B, C, h, w)`."""
    rows = F.embedding(indices, codebook).to(arithmetic_dtype(codebook))
    return rows.transpose(1, 2).reshape(indices.shape[0], codebook.shape[1], *size).contiguous()


def _spread(codes: Tensor, weight: Tensor, bias: Tensor, phi_ratio: float, size: Sequence[int]) -> Tensor:
    """phi(bicubic(codes)): what one scale adds to the reconstruction, `(B, C, *size)`."""
    h = _upsample(codes, size)
    if phi_ratio == 0:
        return h
    return (1 - phi_ratio) * h + phi_ratio * F.conv2d(h, weight.to(h.dtype), bias.to(h.dtype), padding=1)
