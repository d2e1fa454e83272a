"""`preference_cross_entropy` against torch's `linear_cross_entropy` with a gap of its own, and all logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._harness import AuditPlan, Benchmark, Call, Case, Inputs, Provider
from benchmarks._providers import OpCall, our_backends, rows_off
from benchmarks.shapes import MODELS
from hitsr_fast.ops import preference_cross_entropy, preference_cross_entropy_triton

_HIT, _TINY = MODELS["hit-d16"], MODELS["hit-tiny"]
_BATCH = 16  # images, of the long case


@dataclass(frozen=True)
class PreferenceCase(Case):
    """`N` rows of `C` channels, over `K` codes: the forward, or a mean of losses with its gradients.

    Attributes:
        task: forward; or train, and weighted, where losses do not count alike.
    """

    task: Literal["forward", "train", "weighted"]
    N: int = _HIT.tokens
    C: int = _HIT.width
    K: int = _HIT.K
    dtype: str = "float32"

    @property
    def items(self) -> int:
        return self.N

    @property
    def flops(self) -> int:
        """Of the products that a result needs: of the logits, and of two gradients."""
        return 2 * self.N * self.C * self.K * (1 if self.task == "forward" else 3)

    def inputs(self, device: torch.device) -> Inputs:
        """The op's arguments, and the gradients of its results."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        target, rejected = torch.randint(self.K, (2, self.N), generator=generator)
        hidden, weight, bias = draw(self.N, self.C), draw(self.K, self.C) * self.C**-0.5, draw(self.K)
        of_loss = torch.full((self.N,), 1 / self.N)
        if self.task == "weighted":
            of_loss *= 0.5 + torch.rand(self.N, generator=generator)
        dtype = getattr(torch, self.dtype)
        head = [tensor.to(device, dtype) for tensor in (hidden, weight, bias)]
        return (
            *head,
            target.to(device),
            rejected.to(device),
            of_loss.to(device),
            (draw(self.N) / self.N).to(device),
        )

    def expected(self, *inputs: Tensor) -> list[Tensor]:
        """The formula in float64."""
        wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
        return _call(self, wide, _all_logits)()  # type: ignore[no-any-return]

    def wrong_rows(self, result: list[Tensor], expected: list[Tensor]) -> int:
        """Rows, of any result, that are off by more than the dtype allows."""
        dtype = getattr(torch, self.dtype)
        return sum(
            rows_off([found[:, None]], [wanted[:, None]], dtype)
            for found, wanted in zip(result, expected, strict=True)
        )


def _gap(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, rejected: Tensor) -> Tensor:
    """By the two codes of a row alone."""
    return ((weight[target] - weight[rejected]) * hidden).sum(1) + bias[target] - bias[rejected]


def _all_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, rejected: Tensor
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight, bias)
    chosen, refused = (logits.gather(1, tokens[:, None]).squeeze(1) for tokens in (target, rejected))
    return F.cross_entropy(logits, target, reduction="none"), chosen - refused


def _call(case: PreferenceCase, inputs: Inputs, function: Any) -> Call:
    """Loss and gap of the forward; or the weighted sum of both, and its gradients."""
    *arguments, of_loss, of_gap = inputs

    def forward() -> list[Tensor]:
        return list(function(*arguments))

    def train() -> list[Tensor]:
        leaves = [argument.detach().requires_grad_() for argument in arguments[:3]]
        loss, gap = function(*leaves, *arguments[3:])
        # A mean has one factor for all rows.
        loss = loss.mean() if case.task == "train" else (loss * of_loss).sum()
        return list(torch.autograd.grad(loss + (gap * of_gap).sum(), leaves))

    return torch.no_grad()(forward) if case.task == "forward" else train


def _torch_call(case: PreferenceCase, inputs: Inputs) -> Call:
    *arguments, _, of_gap = inputs
    hidden, weight, bias, target, rejected = arguments

    def train() -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight, bias)]
        loss = F.linear_cross_entropy(
            leaves[0], leaves[1], target, linear_bias=leaves[2], options=nn.LinearCrossEntropyOptions()
        )
        gap = _gap(leaves[0], leaves[1], leaves[2], target, rejected)
        return list(torch.autograd.grad(loss + (gap * of_gap).sum(), leaves))

    return train


def _no_linear_cross_entropy(case: PreferenceCase, inputs: Inputs) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return "PyTorch before 2.13 has no linear_cross_entropy"
    return None if case.task == "train" else "its chunks have a mean or a sum alone, with gradients"


def _our_call(case: PreferenceCase, inputs: Inputs) -> Call:
    return _call(case, inputs, preference_cross_entropy)


def _ops(case: PreferenceCase, inputs: Inputs) -> list[OpCall]:
    return [("preference_cross_entropy", (*inputs[:5], 0.0, False))]


def _launch(case: PreferenceCase) -> None:
    hidden, weight, bias, target, rejected, of_loss, of_gap = case.inputs(torch.device("cpu"))
    given = hidden, weight, bias, target, rejected
    preference_cross_entropy_triton.preference_cross_entropy_triton(*given, 0.0, False)
    preference_cross_entropy_triton.preference_cross_entropy_backward_triton(
        of_loss, of_gap, *given, of_loss, 0.0
    )


BENCHMARK = Benchmark(
    op="preference_cross_entropy",
    providers=(
        Provider("eager", lambda case, inputs: _call(case, inputs, _all_logits)),
        Provider("linear_cross_entropy", _torch_call, _no_linear_cross_entropy),
        *our_backends(_our_call, _ops),
    ),
    cases=(
        PreferenceCase("forward"),
        PreferenceCase("train"),
        PreferenceCase("weighted"),
        PreferenceCase("train", C=_TINY.width),
        PreferenceCase("train", N=_BATCH * _HIT.tokens),
    ),
    quick=(
        PreferenceCase("forward", 20, 33, 70),
        PreferenceCase("train", 20, 33, 70),
        PreferenceCase("weighted", 20, 33, 70),
    ),
    audit=AuditPlan(cases=(PreferenceCase("train", dtype="bfloat16"),), launch=_launch),
)
