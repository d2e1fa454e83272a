"""How to upscale an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hitsr_fast.checks import check_choice, check_integer
from hitsr_fast.models.base import INPUTS, Input, SuperResolver
from hitsr_fast.nn.sampling import SamplingOptions


@dataclass(frozen=True)
class UpscaleOptions:
    """How to upscale.

    Args:
        scales: wanted factors; all that the model has by default.
        overlap: input pixels that neighbouring tiles share at least; a quarter of a tile by default.
        batch: tiles run at once; by default so many that their largest outputs are 2 megapixels, at most 32.
        seed: of the draws, where `top_k` is not 1.
        guidance: classifier-free guidance, 0 for none.
        guided_scales: numbers of the token pyramid's scales that are guided; all by default.
        top_k: draw among that many codes; 1 is greedy, 0 all of them.
        top_p: draw among the likeliest codes of that total probability.
        colour_fix: take the low frequencies from the input (see `hitsr_fast.imaging.colour`).
        input: what the model is told of the image: `"photo"` has noise, blur or artefacts, `"clean"` was only
            made smaller.
    """

    scales: Sequence[int] | None = None
    overlap: int | None = None
    batch: int | None = None
    seed: int = 0
    guidance: float = 0.0
    guided_scales: Sequence[int] | None = None
    top_k: int = 1
    top_p: float = 1.0
    colour_fix: bool = True
    input: Input = "clean"

    def __post_init__(self) -> None:
        if self.batch is not None:
            check_integer("batch", self.batch, 1)
        check_integer("seed", self.seed, 0, 2**63 - 1)
        check_choice("input", self.input, INPUTS)

    def factors(self, model: SuperResolver) -> tuple[int, ...]:
        """The wanted factors; raises ValueError if `model` cannot serve these options."""
        offered = tuple(model.scale_factors)
        wanted = offered if self.scales is None else tuple(self.scales)
        if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(offered):
            raise ValueError(f"scales: expected some of {offered}, each once, found {wanted}")
        sampling = SamplingOptions(self.guidance, self.guided_scales, self.top_k, self.top_p)
        sampling.plan(model.num_scales, model.num_scales)
        return wanted
