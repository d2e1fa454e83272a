"""`sample_codes` against what VAR does: guidance, topk, sort, softmax and multinomial in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from benchmarks._harness import AuditPlan, Benchmark, Call, Case, Inputs, Provider
from benchmarks._providers import OpCall, compiled, missing_compiler, our_backends
from benchmarks.shapes import MODELS
from hitsr_fast.ops import sample_codes, sample_codes_triton

GUIDANCE = 1.5

Task = Literal["greedy", "sampled", "guided", "nucleus", "plain"]
_TASKS: tuple[Task, ...] = get_args(Task)

_HIT = MODELS["hit-d16"]
_FIRST, _LAST = _HIT.lengths[0], _HIT.lengths[-1]


@dataclass(frozen=True)
class SamplingCase(Case):
    """`N` rows of `V` logits.

    Attributes:
        task: greedy. sampled: top-k 900 and top-p 0.96, as VAR measures its FID. guided: the same of two
            logits. nucleus: top-p 0.96 alone. plain: no filter.
    """

    task: Task
    N: int
    V: int = _HIT.K

    @property
    def top_k(self) -> int:
        return {"greedy": 1, "sampled": 900, "guided": 900, "nucleus": 0, "plain": 0}[self.task]

    @property
    def top_p(self) -> float:
        return 0.0 if self.task in ("greedy", "plain") else 0.96

    @property
    def items(self) -> int:
        return self.N

    @property
    def flops(self) -> int:
        """Of a logit a comparison, and where one is drawn an exponential, a sum and two comparisons more."""
        return self.N * self.V * (1 if self.task == "greedy" else 5)

    def inputs(self, device: torch.device) -> Inputs:
        """Logits, and those of the other branch where there is guidance."""
        generator = torch.Generator().manual_seed(0)
        branches = 2 if self.task == "guided" else 1
        return tuple(
            (3 * torch.randn(self.N, self.V, generator=generator)).to(device) for _ in range(branches)
        )

    def expected(self, *inputs: Tensor) -> Tensor:
        """What VAR keeps, bool `(N, V)`."""
        return var_filtered(self, inputs).isfinite()

    def wrong_rows(self, result: Tensor, expected: Tensor) -> int:
        """Draws outside of what VAR keeps. That the backends draw the same is for tests/ops."""
        return int((~expected.gather(1, result[:, None])).sum())


def var_filtered(case: SamplingCase, inputs: Inputs) -> Tensor:
    """Guided logits, -infinity where VAR draws none."""
    logits = inputs[0]
    if case.task == "guided":
        logits = (1 + GUIDANCE) * logits - GUIDANCE * inputs[1]
    if case.top_k > 0:
        least = logits.topk(case.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if case.top_p > 0:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - case.top_p
        dropped[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return logits


def eager_call(case: SamplingCase, inputs: Inputs) -> Call:
    """VAR's steps; greedy is an argmax."""

    def greedy() -> Tensor:
        return inputs[0].argmax(-1)

    def draw() -> Tensor:
        return torch.multinomial(var_filtered(case, inputs).softmax(-1), 1).squeeze(1)

    return torch.no_grad()(greedy if case.task == "greedy" else draw)


def compiled_call(case: SamplingCase, inputs: Inputs) -> Call:
    """The same under `torch.compile`."""
    return compiled(eager_call(case, inputs))


def _our_call(case: SamplingCase, inputs: Inputs) -> Call:
    """The op, with the same seed each time."""
    return lambda: sample_codes(
        inputs[0],
        uncond_logits=inputs[1] if case.task == "guided" else None,
        guidance=GUIDANCE if case.task == "guided" else 0.0,
        top_k=case.top_k,
        top_p=case.top_p,
        generator=torch.Generator().manual_seed(0),
    )


def _ops(case: SamplingCase, inputs: Inputs) -> list[OpCall]:
    state = torch.zeros(2, dtype=torch.int64, device=inputs[0].device)
    return [("sample_codes", (inputs[0], None, state, 0.0, case.top_k, case.top_p, 1.0, None))]


def _launch(case: SamplingCase) -> None:
    logits, state = torch.zeros(case.N, case.V), torch.zeros(2, dtype=torch.int64)
    sample_codes_triton.sample_codes_triton(
        logits,
        logits if case.task == "guided" else None,
        None if case.task == "greedy" else state,
        GUIDANCE,
        case.top_k,
        case.top_p,
        1.0,
        None,
    )


BENCHMARK = Benchmark(
    op="sample_codes",
    providers=(
        Provider("eager", eager_call),
        Provider("torch.compile", compiled_call, missing_compiler),
        *our_backends(_our_call, _ops),
    ),
    cases=(
        SamplingCase("greedy", _LAST),
        SamplingCase("sampled", _FIRST),
        *(SamplingCase(task, _LAST) for task in _TASKS[1:]),
    ),
    quick=tuple(SamplingCase(task, 3, V=1000) for task in _TASKS),
    audit=AuditPlan(
        cases=(SamplingCase("greedy", _LAST), SamplingCase("guided", _LAST)),
        launch=_launch,
    ),
)
