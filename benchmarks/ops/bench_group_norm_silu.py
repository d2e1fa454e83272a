"""`group_norm_silu` against PyTorch's `silu(group_norm(x))`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._harness import AuditPlan, Benchmark, Call, Case, Provider, package_version
from benchmarks._providers import missing_compiler, ours
from hitsr_fast.ops import group_norm_silu, group_norm_silu_triton

Inputs = tuple[Tensor, ...]

_EPS = 1e-6

# Of the result's largest value.
_ALLOWED = {"float32": 1e-5, "bfloat16": 2e-2}


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
        error = (result.double() - expected).abs().flatten(1).amax(1)
        return int((~(error <= _ALLOWED[self.dtype] * expected.abs().max())).sum())


def _plain(case: MapsCase) -> Callable[..., Tensor]:
    def norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, case.groups, weight, bias, _EPS))

    return norm_silu


def _eager_call(case: MapsCase, inputs: Inputs) -> Call:
    return torch.no_grad()(lambda: _plain(case)(*inputs))


def _compiled_call(case: MapsCase, inputs: Inputs) -> Call:
    torch.compiler.reset()
    compiled = torch.compile(_plain(case), fullgraph=True, dynamic=False)
    return torch.no_grad()(lambda: compiled(*inputs))


def _our_call(case: MapsCase, inputs: Inputs) -> Call:
    return lambda: group_norm_silu(*inputs, case.groups, eps=_EPS)


def _ours(backend: str | None) -> Provider[MapsCase]:
    return ours(backend, _our_call, lambda case, inputs: [("group_norm_silu", (*inputs, case.groups, _EPS))])


def _launch(case: MapsCase) -> None:
    x, weight, bias = case.inputs(torch.device("cpu"))
    group_norm_silu_triton.group_norm_silu_triton(x, weight, bias, case.groups, _EPS)


BENCHMARK = Benchmark(
    op="group_norm_silu",
    providers=(
        Provider("eager", _eager_call, lambda case, inputs: None, package_version("torch")),
        Provider("torch.compile", _compiled_call, missing_compiler, package_version("torch")),
        _ours("reference"),
        _ours("cpu"),
        _ours("triton"),
        _ours(None),
    ),
    cases=(
        MapsCase(1, 160, 512),
        MapsCase(1, 160, 512, dtype="float32"),
        MapsCase(1, 160, 512, layout="nchw"),
        MapsCase(1, 320, 128),
        MapsCase(1, 640, 32),
        MapsCase(5, 96, 32),
        MapsCase(5, 96, 32, dtype="float32"),
    ),
    quick=(
        MapsCase(2, 10, 7, groups=5),
        MapsCase(2, 10, 7, groups=5, dtype="float32", layout="nchw"),
    ),
    audit=AuditPlan(cases=(MapsCase(1, 160, 512),), launch=_launch),  # no products, hence no scores
)
