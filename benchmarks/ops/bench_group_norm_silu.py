"""`group_norm_silu` against PyTorch's `silu(group_norm(x))`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._harness import AuditPlan, Benchmark, Call, Case, Inputs, Provider
from benchmarks._providers import compiled, missing_compiler, our_backends, rows_off
from benchmarks.shapes import MODELS
from hitsr_fast.ops import group_norm_silu, group_norm_silu_triton

_EPS = 1e-6
_FINE, _MIDDLE, _COARSE = (MODELS["hit-d16"].maps[level] for level in (0, 2, 4))
_TINY = MODELS["hit-tiny"].maps[0]


@dataclass(frozen=True)
class MapsCase(Case):
    """`B` maps of `C` channels, `side` high and wide.

    Attributes:
        layout: nhwc is channels-last.
    """

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
        """Of a value: five for the moments, three for the norm, four for SiLU."""
        return 12 * self.B * self.C * self.side**2

    def inputs(self, device: torch.device) -> Inputs:
        """The map, weight and bias."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.B, self.C, self.side, self.side, generator=generator)
        weight, bias = torch.randn(2, self.C, generator=generator)
        layout = torch.channels_last if self.layout == "nhwc" else torch.contiguous_format
        dtype = getattr(torch, self.dtype)
        return (
            x.to(device, dtype).contiguous(memory_format=layout),
            weight.to(device, dtype),
            bias.to(device, dtype),
        )

    def expected(self, *inputs: Tensor) -> Tensor:
        """PyTorch's formula in float64."""
        return _plain(self)(*(tensor.double() for tensor in inputs))

    def wrong_rows(self, result: Tensor, expected: Tensor) -> int:
        """Maps with a value that is off by more than its dtype allows."""
        return rows_off([result], [expected], result.dtype)


def _plain(case: MapsCase) -> Callable[..., Tensor]:
    def norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, case.groups, weight, bias, _EPS))

    return norm_silu


def _eager_call(case: MapsCase, inputs: Inputs) -> Call:
    return torch.no_grad()(lambda: _plain(case)(*inputs))


def _compiled_call(case: MapsCase, inputs: Inputs) -> Call:
    function = compiled(_plain(case))
    return torch.no_grad()(lambda: function(*inputs))


def _our_call(case: MapsCase, inputs: Inputs) -> Call:
    return lambda: group_norm_silu(*inputs, case.groups, eps=_EPS)


def _launch(case: MapsCase) -> None:
    x, weight, bias = case.inputs(torch.device("cpu"))
    group_norm_silu_triton.group_norm_silu_triton(x, weight, bias, case.groups, _EPS)


BENCHMARK = Benchmark(
    op="group_norm_silu",
    providers=(
        Provider("eager", _eager_call),
        Provider("torch.compile", _compiled_call, missing_compiler),
        *our_backends(_our_call, lambda case, inputs: [("group_norm_silu", (*inputs, case.groups, _EPS))]),
    ),
    cases=(
        MapsCase(1, *_FINE),
        MapsCase(1, *_FINE, dtype="float32"),
        MapsCase(1, *_FINE, layout="nchw"),
        MapsCase(1, *_MIDDLE),
        MapsCase(1, *_COARSE),
        MapsCase(5, *_TINY),
        MapsCase(5, *_TINY, dtype="float32"),
    ),
    quick=(
        MapsCase(2, 10, 7, groups=5),
        MapsCase(2, 10, 7, groups=5, dtype="float32", layout="nchw"),
    ),
    audit=AuditPlan(cases=(MapsCase(1, *_FINE),), launch=_launch),  # no products, hence no scores
)
