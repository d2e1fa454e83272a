"""`attention_prologue` against the lines of VAR's attention between its qkv product and its scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._harness import AuditPlan, Benchmark, Call, Case, Inputs, Provider
from benchmarks._providers import OpCall, compiled, missing_compiler, our_backends, rows_off
from benchmarks.shapes import MODELS
from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import attention_prologue
from hitsr_fast.ops.attention_prologue_triton import attention_prologue_triton

Turn = Callable[[Tensor, Tensor], Tensor]

_HIT = MODELS["hit-d16"]
_SECOND, _LAST = (_HIT.step(number)[::-1] for number in (1, 9))  # L and start


class Arguments(NamedTuple):
    """Of the op, and what VAR's lines start from.

    Attributes:
        qkv: `(B, L, 3 * NH * D)`, the product without its bias.
        biased: the same with it.
        bias: `(3 * NH * D,)`.
        scale_mul: `(1, NH, 1, 1)`, VAR's parameter: logarithm of q_scale.
        rotary: `(L, D / 2, 2)`; empty in the case without.
        k_cache, v_cache: `(B, Tmax, NH, D)`.
    """

    qkv: Tensor
    biased: Tensor
    bias: Tensor
    scale_mul: Tensor
    rotary: Tensor
    k_cache: Tensor
    v_cache: Tensor


@dataclass(frozen=True)
class PrologueCase(Case):
    """`L` tokens after `start` others, for `B` images: VAR's attention (norm), or with a rotary embedding."""

    task: Literal["norm", "rotary"]
    B: int
    L: int
    start: int
    NH: int = _HIT.heads
    D: int = _HIT.D
    dtype: str = "float32"

    @property
    def items(self) -> int:
        return self.B * self.L

    @property
    def flops(self) -> int:
        """Of a value of q, k, v: the bias; of q and k the norm, three each; and three for the rotation."""
        each = 3 + 2 * (3 if self.task == "norm" else 6)
        return each * self.B * self.L * self.NH * self.D

    def inputs(self, device: torch.device) -> Arguments:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        width = self.NH * self.D
        qkv, bias = draw(self.B, self.L, 3 * width), draw(3 * width)
        bias[width : 2 * width] = 0
        angles = draw(self.L if self.task == "rotary" else 0, self.D // 2)
        dtype = getattr(torch, self.dtype)
        caches = draw(2, self.B, self.start + self.L, self.NH, self.D).to(device, dtype)
        qkv = qkv.to(dtype)
        return Arguments(
            qkv.to(device),
            (qkv.float() + bias).to(device, dtype),
            bias.to(device),
            torch.full((1, self.NH, 1, 1), math.log(4.0), device=device),
            torch.stack([angles.cos(), angles.sin()], dim=-1).to(device),
            *caches,
        )

    def expected(self, *inputs: Tensor) -> list[Tensor]:
        """The reference in float64."""
        given = Arguments(*inputs)
        wide = given._replace(
            qkv=given.qkv.double(), k_cache=given.k_cache.double(), v_cache=given.v_cache.double()
        )
        with use_backend("reference"):
            return _op_call(self, wide)()  # type: ignore[no-any-return]

    def wrong_rows(self, result: list[Tensor], expected: list[Tensor]) -> int:
        """Tokens with a value that is off by more than its dtype allows."""
        return rows_off(result, expected, getattr(torch, self.dtype), rows=2)


def _complex_turn(x: Tensor, rotary: Tensor) -> Tensor:
    """Switti's rotation of `(B, NH, L, D)`, by complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(rotary)).flatten(-2).to(x.dtype)


def _real_turn(x: Tensor, rotary: Tensor) -> Tensor:
    """The same for the compiler, which makes no code for complex numbers."""
    (even, odd), (cosine, sine) = x.float().unflatten(-1, (-1, 2)).unbind(-1), rotary.unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _var(given: Arguments, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
    """VAR's lines up to the cache, `(B, NH, L, D)`.

    The product has the bias already, so that its addition is not timed here; putting it together is.
    """
    B, _, NH, D = given.k_cache.shape
    torch.cat([given.bias[: NH * D], given.bias[NH * D : 2 * NH * D], given.bias[2 * NH * D :]])
    q, k, v = given.biased.view(B, -1, 3, NH, D).permute(2, 0, 3, 1, 4).unbind(0)
    scale = given.scale_mul.clamp_max(math.log(100)).exp()
    q, k = F.normalize(q, dim=-1).mul(scale).to(v.dtype), F.normalize(k, dim=-1)
    if given.rotary.numel() > 0:
        q, k = turn(q, given.rotary), turn(k, given.rotary)
    return q, k, v


def _with_own_caches(inputs: Inputs) -> Arguments:
    """What another provider has written must not count as written by this one."""
    given = Arguments(*inputs)
    caches = (torch.full_like(cache, torch.nan) for cache in (given.k_cache, given.v_cache))
    return given._replace(**dict(zip(("k_cache", "v_cache"), caches, strict=True)))


def _concatenated(given: Arguments, past_k: Tensor, past_v: Tensor) -> list[Tensor]:
    q, k, v = _var(given, _complex_turn)
    L, k_cache, v_cache = q.shape[2], torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    return [x.transpose(1, 2) for x in (q, k_cache[:, :, -L:], v_cache[:, :, -L:])]


def _copied(given: Arguments, turn: Turn) -> list[Tensor]:
    q, k, v = (x.transpose(1, 2) for x in _var(given, turn))
    rows = [cache[:, -q.shape[1] :] for cache in (given.k_cache, given.v_cache)]
    for place, values in zip(rows, (k, v), strict=True):
        place.copy_(values)
    return [q, *rows]


def _concatenating_call(case: PrologueCase, inputs: Inputs) -> Call:
    """As VAR has it: the cache grows by a concatenation."""
    given = Arguments(*inputs)
    past = [cache[:, : case.start].transpose(1, 2).contiguous() for cache in (given.k_cache, given.v_cache)]
    return torch.no_grad()(lambda: _concatenated(given, *past))


def _copying_call(case: PrologueCase, inputs: Inputs) -> Call:
    """The same lines with a cache that is allocated once and written in place."""
    given = _with_own_caches(inputs)
    return torch.no_grad()(lambda: _copied(given, _complex_turn))


def _compiled_call(case: PrologueCase, inputs: Inputs) -> Call:
    function, given = compiled(_copied), _with_own_caches(inputs)
    return torch.no_grad()(lambda: function(given, _real_turn))


def _op_call(case: PrologueCase, inputs: Inputs) -> Call:
    given = _with_own_caches(inputs)
    scale = given.scale_mul.clamp_max(math.log(100)).exp().flatten()
    rotary = given.rotary if case.task == "rotary" else None
    rows = [cache[:, case.start :] for cache in (given.k_cache, given.v_cache)]

    def run() -> list[Tensor]:
        q = attention_prologue(
            given.qkv,
            given.k_cache,
            given.v_cache,
            case.start,
            bias=given.bias,
            q_scale=scale,
            rotary=rotary,
        )
        return [q, *rows]

    return torch.no_grad()(run)


def _ops(case: PrologueCase, inputs: Inputs) -> list[OpCall]:
    given = Arguments(*inputs)
    return [
        (
            "attention_prologue",
            (given.qkv, given.k_cache, given.v_cache, case.start, given.bias, None, None),
        )
    ]


def _launch(case: PrologueCase) -> None:
    given = case.inputs(torch.device("cpu"))
    rotary = given.rotary if case.task == "rotary" else None
    attention_prologue_triton(
        given.qkv, given.k_cache, given.v_cache, case.start, given.bias, given.scale_mul.flatten(), rotary
    )


BENCHMARK = Benchmark(
    op="attention_prologue",
    providers=(
        Provider("eager", _concatenating_call),
        Provider("eager:in-place", _copying_call),
        Provider("torch.compile", _compiled_call, missing_compiler),
        *our_backends(_op_call, _ops),
    ),
    cases=(
        PrologueCase("norm", 1, *_SECOND),
        PrologueCase("norm", 1, *_LAST),
        PrologueCase("norm", 1, *_LAST, dtype="bfloat16"),
        PrologueCase("rotary", 1, *_LAST),
        PrologueCase("rotary", 1, *_LAST, dtype="bfloat16"),
        PrologueCase("norm", 8, *_LAST, dtype="bfloat16"),
    ),
    quick=(
        PrologueCase("norm", 2, 5, 3, NH=3, D=10),
        PrologueCase("rotary", 2, 5, 0, NH=3, D=10, dtype="bfloat16"),
    ),
    audit=AuditPlan(
        cases=(PrologueCase("rotary", 2, _HIT.lengths[-1], 16, dtype="bfloat16"),),
        launch=_launch,
    ),
)
