"""Tiles of an image through a model, band by band."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hitsr_fast.imaging.tiles import TilePlan
from hitsr_fast.models.base import SuperResolver
from hitsr_fast.pipeline.options import UpscaleOptions

ReadRows = Callable[[int, int], Tensor]
Progress = Callable[[int, int], None]


class NonFiniteOutputError(RuntimeError):
    """The model gave NaN or infinity for a tile, in float32 too."""


class TileRunner:
    """Runs a model on tiles; those for which it gives NaN or infinity once more in float32.

    Args:
        model: already on `device`.
        device: where tiles are run.
    """

    def __init__(self, model: SuperResolver, device: torch.device) -> None:
        self.model, self.device = model, device
        self._float32_model: SuperResolver | None = None

    def run(
        self, read_rows: ReadRows, plan: TilePlan, options: UpscaleOptions, progress: Progress | None
    ) -> Iterator[dict[int, Tensor]]:
        """Of each band of tiles, {factor: (n, B, 3, t * factor, t * factor) float32 in [0, 1]}.

        Bands that a batch has room for are run together. For the arguments see `HitSR.stream`.
        """
        generator = options.sampling.generator(self.device)
        n, side = len(plan.lefts), self.model.lr_tile * max(self.model.scale_factors)
        batch = options.batch or min(max(2**21 // side**2, 1), 32)
        together = max(batch // n, 1)
        for first in range(0, len(plan.tops), together):
            tops = plan.tops[first : first + together]
            bands = [read_rows(top, min(top + plan.tile, plan.height)) for top in tops]
            tiles = torch.cat([plan.cut(rows.to(self.device, torch.float32)) for rows in bands])
            b = tiles.shape[1]
            parts = []
            for begin in range(0, len(tiles) * b, batch):
                lr = tiles.flatten(0, 1)[begin : begin + batch] * 2 - 1
                parts.append(self._finite_outputs(lr, plan, first * n * b + begin, b, options, generator))
                if progress is not None:
                    progress(first * n * b + begin + len(lr), plan.num_tiles * b)
            outputs = {f: torch.cat([part[f] for part in parts]).unflatten(0, (-1, b)) for f in parts[0]}
            for i in range(len(tops)):
                yield {factor: output[i * n : (i + 1) * n] for factor, output in outputs.items()}

    def _finite_outputs(
        self,
        lr: Tensor,
        plan: TilePlan,
        begin: int,
        b: int,
        options: UpscaleOptions,
        generator: torch.Generator | None,
    ) -> dict[int, Tensor]:
        """Outputs in [0, 1] of tiles in [-1, 1], the first of which is the `begin`th of `b` images."""
        outputs = self._outputs(self.model, lr, options, generator)
        for i in _non_finite(outputs):
            # Half precision can overflow on a rare tile; in float32 the same tile is fine.
            again = self._outputs(self._in_float32(), lr[i : i + 1], options, generator)
            if _non_finite(again):
                band, column = divmod((begin + i) // b, len(plan.lefts))
                raise NonFiniteOutputError(
                    "the model gave NaN or infinity, in float32 too, "
                    f"for the tile at input pixel x={plan.lefts[column]}, y={plan.tops[band]}"
                )
            for factor, output in outputs.items():
                output[i] = again[factor][0]
        return outputs

    @torch.no_grad()
    def _outputs(
        self, model: SuperResolver, lr: Tensor, options: UpscaleOptions, generator: torch.Generator | None
    ) -> dict[int, Tensor]:
        outputs = model.super_resolve(
            lr, options.sampling, input=options.input, factors=options.scales, generator=generator
        )
        return {factor: output.float() * 0.5 + 0.5 for factor, output in outputs.items()}

    def _in_float32(self) -> SuperResolver:
        if self._float32_model is None:
            self._float32_model = self.model.to(torch.float32)
        return self._float32_model


def _non_finite(outputs: dict[int, Tensor]) -> list[int]:
    bad = torch.stack([~output.isfinite().flatten(1).all(dim=1) for output in outputs.values()]).any(dim=0)
    return [int(i) for i in bad.nonzero()]
