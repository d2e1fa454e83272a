"""`modulated_layer_norm` and `gated_residual` against PyTorch's `layer_norm`, product and sum."""

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
from hitsr_fast.ops import gated_residual, modulated_layer_norm, modulated_layer_norm_triton

Function = Callable[..., Tensor]

_HIT = MODELS["hit-d16"]
_FIRST, _LAST, _ALL = _HIT.lengths[0], _HIT.lengths[-1], sum(_HIT.blocks)


@dataclass(frozen=True)
class AdaLNCase(Case):
    """`B` images of `L` tokens of `C` channels.

    Attributes:
        task: norm or residual, or with its gradients norm-train or residual-train.
    """

    task: Literal["norm", "residual", "norm-train", "residual-train"]
    B: int
    L: int
    C: int = _HIT.width
    dtype: str = "float32"

    @property
    def items(self) -> int:
        return self.B * self.L

    @property
    def trains(self) -> bool:
        return self.task.endswith("train")

    @property
    def flops(self) -> int:
        """Of a value: seven for the norm, two for the residual; eleven and three more for the gradients."""
        each = {"norm": 7, "residual": 2, "norm-train": 18, "residual-train": 5}[self.task]
        return each * self.B * self.L * self.C

    def inputs(self, device: torch.device) -> Inputs:
        """The op's arguments, modulations as a model has them, and the gradient of its result."""
        generator = torch.Generator().manual_seed(0)
        rows = 1 if self.task.startswith("norm") else 2
        shapes = [(self.B, self.L, self.C)] * (rows + 1) + [(self.B, 1, 2 * self.C)]
        *values, wide = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
        modulations = wide.chunk(2, dim=-1)[: 3 - rows]
        tensors = [*values[:rows], *modulations, values[rows]]
        return tuple(tensor.to(getattr(torch, self.dtype)) for tensor in tensors)

    def expected(self, *inputs: Tensor) -> list[Tensor]:
        """PyTorch's formula in float64."""
        return _call(self, tuple(tensor.double() for tensor in inputs), _plain(self))()

    def wrong_rows(self, result: list[Tensor], expected: list[Tensor]) -> int:
        """Images with a value that is off by more than its dtype allows."""
        return rows_off(result, expected, getattr(torch, self.dtype))


def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate * y


def _plain(case: AdaLNCase) -> Function:
    return norm if case.task.startswith("norm") else residual


def _call(case: AdaLNCase, inputs: Inputs, function: Function) -> Call:
    """The result of a function, and its gradients where the case trains."""
    *arguments, weight = inputs

    def forward() -> list[Tensor]:
        return [function(*arguments)]

    def train() -> list[Tensor]:
        leaves = [argument.detach().requires_grad_() for argument in arguments]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, weight)]

    return train if case.trains else torch.no_grad()(forward)


def _compiled_call(case: AdaLNCase, inputs: Inputs) -> Call:
    return _call(case, inputs, compiled(_plain(case)))


def _our_call(case: AdaLNCase, inputs: Inputs) -> Call:
    return _call(case, inputs, modulated_layer_norm if case.task.startswith("norm") else gated_residual)


def _ops(case: AdaLNCase, inputs: Inputs) -> list[OpCall]:
    if case.task.startswith("norm"):
        return [("modulated_layer_norm", (*inputs[:3], 1e-6, inputs[0].dtype))]
    return [("gated_residual", inputs[:3])]


def _launch(case: AdaLNCase) -> None:
    x = torch.zeros(case.B, case.L, case.C, dtype=getattr(torch, case.dtype))
    row, mean = x[:, 0].contiguous(), torch.zeros(case.B, case.L)
    modulated_layer_norm_triton.modulated_layer_norm_triton(x, row, row, 1e-6, x.dtype)
    modulated_layer_norm_triton.modulated_layer_norm_backward_triton(x, x, row, mean, mean)
    modulated_layer_norm_triton.gated_residual_triton(x, x, row)
    modulated_layer_norm_triton.gated_residual_backward_triton(x, x, row)


BENCHMARK = Benchmark(
    op="modulated_layer_norm",
    providers=(
        Provider("eager", lambda case, inputs: _call(case, inputs, _plain(case))),
        Provider("torch.compile", _compiled_call, missing_compiler),
        *our_backends(_our_call, _ops),
    ),
    cases=(
        AdaLNCase("norm", 1, _FIRST),
        AdaLNCase("norm", 1, _LAST),
        AdaLNCase("norm", 1, _LAST, dtype="bfloat16"),
        AdaLNCase("residual", 1, _LAST),
        AdaLNCase("residual", 1, _LAST, dtype="bfloat16"),
        AdaLNCase("norm-train", 4, _ALL),
        AdaLNCase("residual-train", 4, _ALL),
    ),
    quick=(
        AdaLNCase("norm", 2, 5, C=33),
        AdaLNCase("residual", 2, 5, C=33, dtype="bfloat16"),
        AdaLNCase("norm-train", 2, 5, C=33),
        AdaLNCase("residual-train", 2, 5, C=33),
    ),
    audit=AuditPlan(
        cases=(AdaLNCase("norm-train", 4, _ALL, dtype="bfloat16"),),
        launch=_launch,
    ),
)
