"""How codes are drawn along a pyramid of scales: options, the plan made of them, and the walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.checks import MAX_INT, check_generator, check_integer, check_number
from hitsr_fast.nn.cached_body import CachedBody
from hitsr_fast.ops.sample_codes import sampling_settings

_CACHED_LOGITS = 2**21  # 8 MiB, which a CPU's caches hold beside the weights


@dataclass(frozen=True)
class SamplingOptions:
    """How a next-scale model draws its codes.

    Args:
        guidance: Classifier-free guidance at the last scale, rising linearly from 0 at the first (VAR); 0
            runs one branch only.
        guided_scales: Numbers of the scales that are guided; None is all. After the last of them one branch
            runs.
        top_k, top_p, temperature: See `ops.sample_codes`; a `top_k` of 1 is greedy.
        seed: Of the draws; None goes on with PyTorch's own random numbers.

    Raises:
        TypeError, ValueError: If an option is of another type, or out of its range.
    """

    guidance: float = 0.0
    guided_scales: Sequence[int] | None = None
    top_k: int = 1
    top_p: float = 1.0
    temperature: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_number("guidance", self.guidance, 0)
        check_integer("top_k", self.top_k, 0, MAX_INT)
        check_number("top_p", self.top_p, 0, 1)
        check_number("temperature", self.temperature, 1e-30, 1e30)
        if self.seed is not None:
            check_integer("seed", self.seed, 0, MAX_INT)
        if self.guided_scales is not None:
            if not isinstance(self.guided_scales, Sequence):
                raise TypeError(
                    f"guided_scales: expected numbers of scales or None, found {self.guided_scales!r}"
                )
            for number in self.guided_scales:
                check_integer("guided_scales", number, 0)
            object.__setattr__(self, "guided_scales", tuple(map(int, self.guided_scales)))
        # Numbers may be NumPy's, which not all of PyTorch takes.
        for name, kind in (("guidance", float), ("top_k", int), ("top_p", float), ("temperature", float)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        if self.seed is not None:
            object.__setattr__(self, "seed", int(self.seed))

    def generator(self, device: torch.device) -> torch.Generator | None:
        """One that starts from the seed; None without a seed."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def plan(self, scales: int, steps: int) -> SamplingPlan:
        """Lay the options out over the first `steps` of a model's scales.

        Raises:
            ValueError: If a guided scale is none of the model's.
        """
        guided = range(scales) if self.guided_scales is None else self.guided_scales
        if not set(guided) <= set(range(scales)):
            raise ValueError(
                f"guided_scales: expected numbers from 0 to {scales - 1}, found {sorted(guided)}"
            )
        strengths = (self.guidance * step / max(scales - 1, 1) * (step in guided) for step in range(steps))
        return SamplingPlan(tuple(strengths), scales, self.top_k, self.top_p, self.temperature)


def check_sampling(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a `SamplingOptions`."""
    if not isinstance(value, SamplingOptions):
        raise TypeError(f"{name}: expected SamplingOptions, found {value!r}")


class SamplingPlan(NamedTuple):
    """What is fixed before the first scale."""

    strengths: tuple[float, ...]  # of guidance, one a scale that is run; 0 runs one branch only
    scales: int  # all of the model, run or not
    top_k: int  # see `ops.sample_codes`, as for the two that follow
    top_p: float
    temperature: float

    @property
    def guided_steps(self) -> int:
        """Scales up to the last guided one: so long the class-free branch has to run too."""
        guided = [step for step, strength in enumerate(self.strengths) if strength != 0]
        return guided[-1] + 1 if guided else 0

    @property
    def kind(self) -> SamplingPlan:
        """The plan of all those that take the same steps, whatever their numbers: a graph is found by it.

        The same scales are guided, and both are greedy or neither is. The numbers go along as `settings`.
        """
        strengths = tuple(float(strength != 0) for strength in self.strengths)
        return SamplingPlan(strengths, self.scales, int(self.top_k == 1), top_p=1.0, temperature=1.0)

    def settings(self, device: torch.device) -> Tensor:
        """The numbers, int64 `(scales that are run, 5)` on `device`: see `ops.sample_codes`."""
        return sampling_settings(self.strengths, self.top_k, self.top_p, self.temperature, device)

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

    def draw(
        self, logits: Tensor, states: Tensor | None, step: int, settings: Tensor | None = None
    ) -> Tensor:
        """Codes `(N,)` int64 of scale number `step` by `ops.sample_codes`, with what `states` gave.

        `logits` are `(1, N, K)`, or `(2, N, K)` where the scale is guided, the class-free branch second.
        `settings`, of a plan of this kind, take the place of this one's numbers.
        """
        conditional, *rest = logits.unbind()
        codes: Tensor = torch.ops.hitsr_fast.sample_codes(
            *(conditional, rest[0] if rest else None, None if states is None else states[step]),
            *(self.strengths[step], self.top_k, self.top_p, self.temperature),
            None if settings is None else settings[step],
        )
        return codes


class Classifier:
    """The linear map from rows to logits, in the dtype of its weight `(K, width)` and bias `(K,)`."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        self.cached_rows = max(_CACHED_LOGITS // len(weight), 1)

    def logits(self, rows: Tensor) -> Tensor:
        """`(..., K)` float32 of rows `(..., width)`."""
        return F.linear(rows, self.weight, self.bias).float()

    def codes(
        self,
        rows: Tensor,
        plan: SamplingPlan,
        states: Tensor | None,
        step: int,
        settings: Tensor | None = None,
    ) -> Tensor:
        """Codes `(B, L)` of rows `(B, L, width)`, or `(2 B, L, width)` where the scale is guided."""
        branches = rows.flatten(0, 1).unflatten(0, (2 if plan.strengths[step] != 0 else 1, -1))
        # Greedy codes ask nothing of other rows: on a CPU in parts, whose logits stay in the cache.
        parts = branches.split(self.cached_rows, 1) if plan.top_k == 1 and rows.is_cpu else (branches,)
        codes = torch.cat([plan.draw(self.logits(part), states, step, settings) for part in parts])
        return codes.view(-1, rows.shape[1])


def guided_logits(branches: Tensor, strength: float) -> Tensor:
    """Logits `(...)` of `(2, ...)`, the class-free branch second, or of `(1, ...)`, which has no guidance."""
    conditional, *free = branches.unbind()
    return (1 + strength) * conditional - strength * free[0] if free else conditional


def sample_scales(
    plan: SamplingPlan,
    body: CachedBody,
    lengths: Sequence[int],
    *,
    prefix: int = 0,
    modulation: Tensor,
    head_modulation: Tensor,
    head_eps: float = 1e-6,
    embed: Callable[[int, Tensor | None], Tensor],
    choose: Callable[[int, Tensor], Tensor],
    feed: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Walk over the scales of a next-scale model; waits for nothing on the device.

    With guidance a second, class-free branch of B further sequences runs up to the last guided scale.

    Args:
        lengths: Codes of each scale.
        prefix: Rows in front of those of the first scale.
        modulation: `(layers, 6, B, width)`, or 2 B with guidance, the class-free branch second; see
            `CachedBody`.
        head_modulation: `(2, B, width)` or 2 B, scale and shift of the norm before the classifier.
        head_eps: Of that norm.
        embed: From a scale's number and input map, rows `(B, L, width)`, and 2 B where the branches differ;
            of the first scale, which has no input, after the prefix.
        choose: From a scale's number and the norm's rows `(B, L, width)`, or 2 B where the scale is guided,
            its codes.
        feed: From a scale's codes the next scale's input map.

    Returns:
        What `choose` returned for each scale.
    """
    branches = modulation.shape[2]
    batch = branches // 2 if plan.guided_steps else branches
    cache = body.new_cache(branches, prefix + sum(lengths[: len(plan.strengths)]))
    start, inputs, chosen = 0, None, []
    for step, strength in enumerate(plan.strengths):
        if step == plan.guided_steps:  # no later scale is guided: the class-free branch ends here
            branches, cache = batch, cache.first(batch)
            modulation = modulation[:, :, :batch]
        x = embed(step, inputs)
        stream = body(torch.cat([x, x]) if len(x) < branches else x, modulation, cache, start)
        start += x.shape[1]
        seen = batch if strength == 0 else branches  # else the other branch is there for its keys alone
        scale, shift = head_modulation[:, :seen].unbind()
        _, rows = stream.last(seen, lengths[step]).normed(scale, shift, eps=head_eps)
        chosen.append(choose(step, rows))
        inputs = feed(chosen[-1])
    return chosen
