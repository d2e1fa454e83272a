"""`QuantizerBank`: what a multi-scale residual quantizer consists of; `ReconstructionWalk`: step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast import ops
from hitsr_fast.checks import check_choice, check_integer, check_number
from hitsr_fast.ops.nearest_code import METRICS
from hitsr_fast.ops.residual_quantize import check_bank
from hitsr_fast.pyramid import Scale, ScalePyramid


@dataclass(frozen=True, eq=False)
class QuantizerBank:
    """Codebook and phis, and the `residual_*` ops on them; checked when made, but for the tensors' values.

    Codes are int64 indices `(B, T)`, or rows `(B, T, C)`: mixtures of codes, which are in no codebook.
    """

    codebook: Tensor  # (K, C)
    phi_weight: Tensor  # (P, C, C, 3, 3)
    phi_bias: Tensor  # (P, C)
    phi_index: tuple[int, ...]  # which phi each scale uses
    phi_ratio: float  # r of phi; 0 leaves it out
    metric: ops.Metric = "l2"

    def __post_init__(self) -> None:
        check_bank(*self.tensors)
        for entry in {*self.phi_index}:
            check_integer("phi_index", entry, 0, len(self.phi_weight) - 1)
        check_number("phi_ratio", self.phi_ratio, 0, 1)
        check_choice("metric", self.metric, METRICS)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codebook, weight and bias: the first arguments of the ops."""
        return self.codebook, self.phi_weight, self.phi_bias

    def to(self, dtype: torch.dtype) -> QuantizerBank:
        """The same in another dtype."""
        codebook, weight, bias = (tensor.to(dtype) for tensor in self.tensors)
        return replace(self, codebook=codebook, phi_weight=weight, phi_bias=bias)

    def by_taps(self) -> QuantizerBank:
        """The same; the channels of a tap of phi lie together in memory, as GPUs read them: a copy."""
        weight = self.phi_weight.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        return replace(self, phi_weight=weight)

    def quantize(self, z: Tensor, scales: Sequence[Scale], **options: Any) -> ops.ResidualQuantized:
        """`residual_quantize` of `(B, C, H, W)` over some first scales, with its other options."""
        options |= self._options(scales)
        return ops.residual_quantize(z, *self.tensors, metric=self.metric, **options)

    def decode(
        self, codes: Tensor, scales: Sequence[Scale], size: Sequence[int], **options: Any
    ) -> ops.ResidualDecoded:
        """`residual_decode` of the codes of some first scales at a size, with its other options."""
        bank, indices = self._resolved(codes)
        options |= self._options(scales)
        return ops.residual_decode(indices, *bank.tensors, size=size, **options)

    def step(
        self, reconstruction: Tensor, codes: Tensor, step: int, scale: Scale, next_scale: Scale | None
    ) -> Tensor:
        """`residual_step`: the codes of scale number `step` are added to `(B, C, H, W)` in place."""
        bank, indices = self._resolved(codes)
        phi = self.phi_index[step]
        own = bank.codebook, bank.phi_weight[phi], bank.phi_bias[phi]
        sizes: dict[str, Any] = {"scale": scale, "next_scale": next_scale}
        return ops.residual_step(reconstruction, indices, *own, **sizes, phi_ratio=self.phi_ratio)

    def _options(self, scales: Sequence[Scale]) -> dict[str, Any]:
        phi_index = self.phi_index[: len(scales)]
        return {"scales": scales, "phi_index": phi_index, "phi_ratio": self.phi_ratio}

    def _resolved(self, codes: Tensor) -> tuple[QuantizerBank, Tensor]:
        """A bank and indices into it; rows become a codebook of their own."""
        if codes.dim() != 3:
            return self, codes
        B, T, C = codes.shape
        dtype = torch.promote_types(codes.dtype, self.phi_weight.dtype)
        indices = torch.arange(B * T, device=codes.device).view(B, T)
        return replace(self.to(dtype), codebook=codes.reshape(-1, C).to(dtype)), indices


class ReconstructionWalk:
    """The reconstruction as it grows step by step: what the sampler and teacher forcing feed on.

    With `ar_grid="target"` a step accumulates on the grid of its own target; when a target is complete its
    reconstruction is kept in `finished` and the codes so far are decoded again on the next target's grid, so
    the map that conditions a step is the one whose residual was quantized at that step.
    With `"full"` it is the grid of the last target throughout. There is a bank for each target.
    """

    def __init__(
        self, banks: Sequence[QuantizerBank], pyramid: ScalePyramid, batch: int, *, ar_grid: str = "target"
    ) -> None:
        self.banks, self.pyramid, self.ar_grid = banks, pyramid, ar_grid
        self.step = 0
        self.finished: list[Tensor] = []
        self._codes: list[Tensor] = []
        self._target = 0 if ar_grid == "target" else len(banks) - 1
        codebook = banks[0].codebook
        dtype = torch.promote_types(codebook.dtype, torch.float32)
        shape = (batch, codebook.shape[1], *pyramid.targets[self._target])
        self._map = torch.zeros(shape, dtype=dtype, device=codebook.device)

    def advance(self, codes: Tensor) -> Tensor:
        """Add the codes of the current step; returns the next step's input map `(B, C, h, w)`.

        After the last step the returned map is empty, `(B, C, 0, 0)`.
        """
        with torch.no_grad():  # not as a decorator, which the compiler does not see through here
            return self._advanced(codes)

    def _advanced(self, codes: Tensor) -> Tensor:
        pyramid, step = self.pyramid, self.step
        self._codes.append(codes)
        self.step += 1
        following = pyramid.sizes[self.step] if self.step < len(pyramid.sizes) else None
        completes = self.step in pyramid.steps
        crossing = self.ar_grid == "target" and completes and following is not None
        bank = self.banks[self._target]
        pooled = bank.step(self._map, codes, step, pyramid.sizes[step], None if crossing else following)
        if completes:
            target = pyramid.steps.index(self.step)
            self.finished.append(self._map if target == self._target else self._decoded(target))
        if crossing and following is not None:
            self._target += 1
            self._map = self._decoded(self._target)
            pooled = F.adaptive_avg_pool2d(self._map, following)
        return pooled

    def _decoded(self, target: int) -> Tensor:
        """The codes so far on the grid of a target."""
        pyramid, codes = self.pyramid, torch.cat(self._codes, 1)
        return self.banks[target].decode(codes, pyramid.sizes[: self.step], pyramid.targets[target])[0]
