"""A stand-in for a model: it repeats pixels, and can be made to fail or to shift colours."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from hitsr_fast.nn.sampling import SamplingOptions


class NearestModel(torch.nn.Module):
    """Repeats pixels. `bad_above`: tiles with a pixel above it give NaN, unless in float32 when `heals`."""

    lr_tile = 16
    scale_factors = (1, 2, 4)
    num_scales = 10
    colour_fix_levels = {1: 3, 2: 4, 4: 5}  # noqa: RUF012

    def __init__(self, shift: float = 0.0, bad_above: float = 2.0, heals: bool = True) -> None:
        super().__init__()
        self.shift, self.bad_above, self.heals = shift, bad_above, heals
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        self.batches: list[int] = []
        self.told: list[str] = []

    def to(self, dtype: torch.dtype) -> NearestModel:  # a copy, as `SuperResolver` has it
        return super(NearestModel, copy.deepcopy(self)).to(dtype)

    def super_resolve(
        self,
        lr: Tensor,
        sampling: SamplingOptions,
        *,
        input: str = "clean",
        factors: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[int, Tensor]:
        assert lr.shape[1:] == (3, 16, 16) and lr.dtype == torch.float32 and lr.abs().max() <= 1
        self.batches.append(len(lr))
        self.told.append(input)
        x = lr + self.shift
        if sampling.top_k != 1:
            x = x + 0.1 * torch.randn(x.shape, generator=generator)
        if not (self.heals and self.weight.dtype == torch.float32):
            bad = lr.flatten(1).amax(dim=1) > self.bad_above
            x = torch.where(bad[:, None, None, None], torch.nan, x)
        return {f: x.repeat_interleave(f, -1).repeat_interleave(f, -2) for f in factors or self.scale_factors}
