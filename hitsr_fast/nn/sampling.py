"""How codes are drawn along a pyramid of scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hitsr_fast.checks import MAX_INT, check_generator, check_integer, check_number


class SamplingPlan(NamedTuple):
    """What is fixed before the first scale; hashable, so that a captured graph can be found by it.

    Attributes:
        strengths: Of classifier-free guidance, one a scale that is run; 0 runs one branch only.
        scales: All of the model, run or not.
        top_k: See `ops.sample_codes`; 1 is greedy.
        top_p: See `ops.sample_codes`.
    """

    strengths: tuple[float, ...]
    scales: int
    top_k: int
    top_p: float

    @property
    def guided_steps(self) -> int:
        """Scales up to the last guided one: so long the class-free branch has to run too."""
        guided = [step for step, strength in enumerate(self.strengths) if strength > 0]
        return guided[-1] + 1 if guided else 0

    def states(self, device: torch.device, generator: torch.Generator | None) -> Tensor | None:
        """Seed and offset of each scale's draws, int64 `(scales, 2)` on `device`; None when greedy.

        Scales that are not run take theirs too: what is drawn does not depend on how many are.
        """
        if self.top_k == 1:
            return None
        check_generator(generator)
        source = device if generator is None else generator.device
        drawn = torch.randint(2**63 - 1, (self.scales, 2), generator=generator, device=source)
        return drawn.to(device)

    def draw(self, logits: Tensor, states: Tensor | None, step: int) -> Tensor:
        """Codes `(N,)` int64 of one scale by `ops.sample_codes`.

        Args:
            logits: `(1, N, K)`; `(2, N, K)` where the scale is guided, the class-free branch second.
            states: From `states`.
            step: Number of the scale.
        """
        conditional, *rest = logits.unbind()
        codes: Tensor = torch.ops.hitsr_fast.sample_codes(
            conditional,
            rest[0] if rest else None,
            None if states is None else states[step],
            self.strengths[step],
            self.top_k,
            self.top_p,
            1.0,
        )
        return codes


def sampling_plan(
    scales: int,
    steps: int,
    *,
    guidance: float = 0.0,
    guided_scales: Sequence[int] | None = None,
    top_k: int = 1,
    top_p: float = 1.0,
) -> SamplingPlan:
    """Check the options of a sampler and lay them out over the scales.

    Args:
        scales: Number of scales of the model.
        steps: How many of them are run, from the first on.
        guidance: Classifier-free guidance at the last scale, rising linearly from 0 at the first (VAR).
        guided_scales: Numbers of the scales that are guided; None is all. After the last of them one branch
            runs.
        top_k: Keep the k largest logits; 1 is greedy (the lowest index on ties), 0 keeps all.
        top_p: Then keep the smallest set of codes whose probability reaches `top_p`; the largest stays.

    Raises:
        TypeError: If an option is of another type.
        ValueError: If an option is out of its range.
    """
    check_number("guidance", guidance, 0)
    check_integer("top_k", top_k, 0, MAX_INT)
    check_number("top_p", top_p)
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected a value in (0, 1], found {top_p}")
    if guided_scales is not None and not isinstance(guided_scales, Sequence):
        raise TypeError(f"guided_scales: expected numbers of scales or None, found {guided_scales!r}")
    guided = set(range(scales)) if guided_scales is None else set(guided_scales)
    if not guided <= set(range(scales)):
        raise ValueError(f"guided_scales: expected numbers from 0 to {scales - 1}, found {sorted(guided)}")
    strengths = (guidance * step / max(scales - 1, 1) * (step in guided) for step in range(steps))
    return SamplingPlan(tuple(strengths), scales, top_k, top_p)
