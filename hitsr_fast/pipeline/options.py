"""How to upscale an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from hitsr_fast.checks import check_choice, check_integer
from hitsr_fast.models.base import INPUTS, Input, SuperResolver, listed_factors
from hitsr_fast.nn.sampling import SamplingOptions, check_sampling


@dataclass(frozen=True)
class UpscaleOptions:
    """How to upscale.

    Args:
        scales: wanted factors; all that the model has by default.
        overlap: input pixels that neighbouring tiles share at least; a quarter of a tile by default.
        batch: tiles run at once; by default so many that their largest outputs are 2 megapixels, at most 32.
        sampling: how codes are drawn; the seed, 0 by default, is that of all tiles.
        colour_fix: take the low frequencies from the input (see `hitsr_fast.imaging.colour`).
        input: what the model is told of the image: `"photo"` has noise, blur or artefacts, `"clean"` was only
            made smaller, `"unknown"` leaves it open.
    """

    scales: Sequence[int] | None = None
    overlap: int | None = None
    batch: int | None = None
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(seed=0))
    colour_fix: bool = True
    input: Input = "clean"

    def __post_init__(self) -> None:
        if self.scales is not None:
            object.__setattr__(self, "scales", listed_factors("scales", self.scales))
        check_sampling("sampling", self.sampling)
        if self.batch is not None:
            check_integer("batch", self.batch, 1)
        check_choice("input", self.input, INPUTS)

    @staticmethod
    def of(**options: Any) -> UpscaleOptions:
        """From fields of its own and of `SamplingOptions`.

        Example:
            >>> UpscaleOptions.of(scales=(4,), guidance=1.5).sampling.guidance
            1.5
        """
        names = {field.name for field in fields(SamplingOptions)} & options.keys()
        sampling = {"seed": 0} | {name: options.pop(name) for name in names}
        return UpscaleOptions(sampling=SamplingOptions(**sampling), **options)

    def factors(self, model: SuperResolver) -> tuple[int, ...]:
        """The wanted factors; raises ValueError if `model` cannot serve these options."""
        offered = tuple(model.scale_factors)
        wanted = offered if self.scales is None else tuple(self.scales)
        if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(offered):
            raise ValueError(f"scales: expected some of {offered}, each once, found {wanted}")
        self.sampling.plan(model.num_scales, model.num_scales)
        return wanted
