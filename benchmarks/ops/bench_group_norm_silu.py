"""`group_norm_silu`, alone and with its gradients, against PyTorch's `silu(group_norm(x))`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._harness import AuditPlan, Benchmark, Call, Case, Inputs, Provider
from benchmarks._providers import OpCall, compiled, missing_compiler, our_backends, rows_off
from benchmarks.shapes import MODELS
from hitsr_fast.ops import group_norm_silu, group_norm_silu_triton

_EPS = 1e-6
_FINE, _MIDDLE, _COARSE = (MODELS["hit-d16"].maps[level] for level in (0, 2, 4))
_TINY = MODELS["hit-tiny"].maps[0]


@dataclass(frozen=True)
class MapsCase(Case):
    """`B` maps of `C` channels, `side` high and wide.

    Attributes:
        task: forward, or train, with its gradients.
        layout: nhwc is channels-last.
    """

    task: Literal["forward", "train"]
    B: int
    C: int
    side: int
    groups: int = 32
    dtype: str = "bfloat16"
    layout: Literal["nchw", "nhwc"] = "nhwc"

    @property
    def items(self) -> int:
        return self.B

    @property
    def flops(self) -> int:
        """Of a value: five for the moments, three for the norm, four for SiLU; 21 more for the gradients."""
        return (12 if self.task == "forward" else 33) * self.B * self.C * self.side**2

    def inputs(self, device: torch.device) -> Inputs:
        """The map, weight and bias, and the gradient of the result."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.B, self.C, self.side, self.side)
        x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
        weight, bias = torch.randn(2, self.C, generator=generator)
        layout = torch.channels_last if self.layout == "nhwc" else torch.contiguous_format
        dtype = getattr(torch, self.dtype)
        return (
            x.to(device, dtype).contiguous(memory_format=layout),
            weight.to(device, dtype),
            bias.to(device, dtype),
            grad.to(device, dtype).contiguous(memory_format=layout),
        )

    def expected(self, *inputs: Tensor) -> list[Tensor]:
        """PyTorch's formula in float64."""
        return _call(self, tuple(tensor.double() for tensor in inputs), _plain(self))()

    def wrong_rows(self, result: list[Tensor], expected: list[Tensor]) -> int:
        """Maps, and channels of gradients, with a value that is off by more than the dtype allows."""
        dtype = getattr(torch, self.dtype)
        return sum(
            rows_off([found[:, None]], [wanted[:, None]], dtype)
            for found, wanted in zip(result, expected, strict=True)
        )


def _plain(case: MapsCase) -> Callable[..., Tensor]:
    def norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, case.groups, weight, bias, _EPS))

    return norm_silu


def _call(case: MapsCase, inputs: Inputs, function: Callable[..., Tensor]) -> Callable[[], list[Tensor]]:
    """The result of a function, and its gradients where the case trains."""
    *arguments, grad = inputs

    def forward() -> list[Tensor]:
        return [function(*arguments)]

    def train() -> list[Tensor]:
        leaves = [argument.detach().requires_grad_() for argument in arguments]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return train if case.task == "train" else torch.no_grad()(forward)


def _compiled_call(case: MapsCase, inputs: Inputs) -> Call:
    return _call(case, inputs, compiled(_plain(case)))


def _our_call(case: MapsCase, inputs: Inputs) -> Call:
    return _call(case, inputs, lambda *given: group_norm_silu(*given, case.groups, eps=_EPS))


def _ops(case: MapsCase, inputs: Inputs) -> list[OpCall]:
    return [("group_norm_silu", (*inputs[:3], case.groups, _EPS))]


def _launch(case: MapsCase) -> None:
    x, weight, bias, grad = case.inputs(torch.device("cpu"))
    mean = torch.zeros(case.B, case.groups)
    group_norm_silu_triton.group_norm_silu_triton(x, weight, bias, case.groups, _EPS)
    group_norm_silu_triton.group_norm_silu_backward_triton(grad, x, weight, bias, mean, mean)


BENCHMARK = Benchmark(
    op="group_norm_silu",
    providers=(
        Provider("eager", lambda case, inputs: _call(case, inputs, _plain(case))),
        Provider("torch.compile", _compiled_call, missing_compiler),
        *our_backends(_our_call, _ops),
    ),
    cases=(
        MapsCase("forward", 1, *_FINE),
        MapsCase("forward", 1, *_FINE, dtype="float32"),
        MapsCase("forward", 1, *_FINE, layout="nchw"),
        MapsCase("forward", 1, *_MIDDLE),
        MapsCase("forward", 1, *_COARSE),
        MapsCase("forward", 5, *_TINY),
        MapsCase("forward", 5, *_TINY, dtype="float32"),
        MapsCase("train", 1, *_MIDDLE, dtype="float32"),
        MapsCase("train", 1, *_MIDDLE, dtype="float32", layout="nchw"),
        MapsCase("train", 1, *_MIDDLE),
        MapsCase("train", 8, *_TINY, dtype="float32"),
        MapsCase("train", 8, *_TINY, dtype="float32", layout="nchw"),
    ),
    quick=(
        MapsCase("forward", 2, 10, 7, groups=5),
        MapsCase("forward", 2, 10, 7, groups=5, dtype="float32", layout="nchw"),
        MapsCase("train", 2, 10, 7, groups=5, dtype="float32"),
    ),
    audit=AuditPlan(cases=(MapsCase("train", 1, *_FINE),), launch=_launch),  # no products, hence no scores
)
