"""`scale_block_attention` against what people use today for attention over scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks._harness import AuditPlan, Benchmark, Call, Case, Inputs, Provider, ScoreLoop
from benchmarks._providers import OpCall, compiled, missing_compiler, our_backends
from benchmarks.shapes import MODELS
from hitsr_fast.ops import scale_block_attention
from hitsr_fast.ops import scale_block_attention_triton as triton
from hitsr_fast.reference.scale_block_attention import scale_block_attention as reference
from hitsr_fast.reference.scale_block_attention import scale_block_attention_backward

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # of (B, T, NH, D)


class Result(NamedTuple):
    """The output, and the gradients of q, k and v where the case asks for them; `(B, T, NH, D)`."""

    out: Tensor
    gradients: tuple[Tensor, ...] = ()


class Expected(NamedTuple):
    """Results in float64, and those of the reference in the dtype of the case."""

    exact: Result
    reference: Result


@dataclass(frozen=True)
class AttentionCase(Case):
    """One layer; queries, keys and values are normally distributed.

    Attributes:
        task: forward, or train: forward and backward.
    """

    task: Literal["forward", "train"]
    dtype: str
    B: int = 1
    NH: int = MODELS["hit-d16"].heads
    D: int = MODELS["hit-d16"].D
    model: str = "hit-d16"

    @property
    def lengths(self) -> list[int]:
        return MODELS[self.model].blocks

    @property
    def items(self) -> int:
        return self.B * sum(self.lengths)

    @property
    def flops(self) -> int:
        """Of two products forward, and of five more backward: the scores are made anew."""
        return self.scores * 2 * self.D * (2 if self.task == "forward" else 7)

    @property
    def scores(self) -> int:
        """Pairs of a query and a key that it sees."""
        return self.B * self.NH * MODELS[self.model].pairs

    def inputs(self, device: torch.device) -> Inputs:
        """q, k, v and the gradient of the output, `(B, T, NH, D)`."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.B, sum(self.lengths), self.NH, self.D)
        dtype = getattr(torch, self.dtype)
        return tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))

    def expected(self, *inputs: Tensor) -> Expected:
        return Expected(
            self._reference(tuple(tensor.double() for tensor in inputs)),
            self._reference(inputs),
        )

    def _reference(self, inputs: Inputs) -> Result:
        *qkv, grad = inputs
        scale = self.D**-0.5
        out, lse = reference(*qkv, self.lengths, scale)
        if self.task == "forward":
            return Result(out)
        return Result(out, scale_block_attention_backward(grad, *qkv, out, lse, self.lengths, scale))

    def wrong_rows(self, result: Result, expected: Expected) -> int:
        """Rows that are further from float64 than three times the reference's worst row, and a few roundings.

        In 16 bits the reference rounds its result alone, where others also round what they compute with.
        """
        wrong = 0
        unit = {"float32": 2.0**-22, "bfloat16": 2.0**-7, "float16": 2.0**-10}[self.dtype]
        results = zip(*(_tensors(r) for r in (result, *expected)), strict=True)
        for found, exact, other in results:
            allowed = 3 * (other.double() - exact).abs().max() + unit * exact.abs().max()
            wrong += int(((found.double() - exact).abs().amax(-1) > allowed).sum())
        return wrong


def _tensors(result: Result) -> tuple[Tensor, ...]:
    return (result.out, *result.gradients)


def _call(case: AttentionCase, inputs: Inputs, attention: Attention) -> Call:
    q, k, v, grad = inputs

    def forward() -> Result:
        with torch.no_grad():
            return Result(attention(q, k, v))

    def train() -> Result:
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        out = attention(*leaves)
        return Result(out.detach(), torch.autograd.grad(out, leaves, grad))

    return forward if case.task == "forward" else train


# --- peers


def _heads_first(attend: Attention) -> Attention:
    """PyTorch's attention takes `(B, NH, T, D)`."""
    return lambda q, k, v: attend(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _block_of_token(case: AttentionCase, device: torch.device) -> Tensor:
    lengths = torch.tensor(case.lengths, device=device)
    return torch.repeat_interleave(torch.arange(len(case.lengths), device=device), lengths)


def _dense_mask(case: AttentionCase, inputs: Inputs) -> Call:
    """As VAR trains: a mask with a number for each pair of tokens."""
    block = _block_of_token(case, inputs[0].device)
    hidden = block[:, None] < block[None, :]
    mask = torch.zeros(hidden.shape, dtype=inputs[0].dtype, device=hidden.device).masked_fill(
        hidden, -torch.inf
    )
    return _call(
        case, inputs, _heads_first(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    )


def _call_per_scale(case: AttentionCase, inputs: Inputs) -> Call:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks, begin = [], 0
        for end in accumulate(case.lengths):
            rows = q[:, :, begin:end]
            blocks.append(F.scaled_dot_product_attention(rows, k[:, :, :end], v[:, :, :end]))
            begin = end
        return torch.cat(blocks, dim=2)

    return _call(case, inputs, _heads_first(attend))


def _flex(case: AttentionCase, inputs: Inputs) -> Call:
    block, T = _block_of_token(case, inputs[0].device), sum(case.lengths)
    mask = create_block_mask(
        lambda b, h, q, k: block[q] >= block[k], None, None, T, T, device=str(inputs[0].device)
    )
    function = compiled(flex_attention)
    return _call(case, inputs, _heads_first(lambda q, k, v: function(q, k, v, block_mask=mask)))


def _no_flex(case: AttentionCase, inputs: Inputs) -> str | None:
    if inputs[0].device.type == "cpu" and case.task != "forward":
        return "FlexAttention has no backward on the CPU"
    return missing_compiler()


# --- ours


def _our_call(case: AttentionCase, inputs: Inputs) -> Call:
    return _call(case, inputs, lambda q, k, v: scale_block_attention(q, k, v, block_lengths=case.lengths))


def _ops(case: AttentionCase, inputs: Inputs) -> list[OpCall]:
    scale, (q, k, v, grad) = case.D**-0.5, inputs
    return [
        ("scale_block_attention", (q, k, v, case.lengths, scale)),
        ("scale_block_attention_backward", (grad, q, k, v, grad, grad, case.lengths, scale)),
    ]


def _compile_triton(case: AttentionCase) -> None:
    """Forward, backward, and the second scale's step with a cache."""
    q, k, v, grad = case.inputs(torch.device("cpu"))
    out, lse = triton.scale_block_attention_triton(q, k, v, case.lengths, case.D**-0.5)
    triton.scale_block_attention_backward_triton(grad, q, k, v, out, lse, case.lengths, case.D**-0.5)
    first, second = case.lengths[:2]
    triton.cached_attention_triton(q[:, first : first + second], k, v, first + second, case.D**-0.5)


def _score_loop(kernel: str, products: int) -> ScoreLoop[AttentionCase]:
    """The loop over whole tiles of a kernel, which does so many products of a score."""

    def constants(case: AttentionCase, target: str) -> dict[str, int]:
        from tests.kernels.aot import TARGETS

        chip = triton.family(TARGETS[target].backend, TARGETS[target].arch)
        return triton.constants(kernel, getattr(torch, case.dtype), case.D, chip)

    def per_turn(case: AttentionCase, target: str) -> int:
        found = constants(case, target)
        return found["BLOCK_M"] * found["BLOCK_N"]

    def tensor_flops(case: AttentionCase) -> int:
        return case.scores * 2 * constants(case, "sm_90")["DP"] * products

    return ScoreLoop(lambda case: case.scores, per_turn, tensor_flops, exponentials=1)


BENCHMARK = Benchmark(
    op="scale_block_attention",
    providers=(
        Provider("sdpa:dense-mask", _dense_mask),
        Provider("sdpa:per-scale", _call_per_scale),
        Provider("flex-attention", _flex, _no_flex),
        *our_backends(_our_call, _ops, ("reference", "cpu", "triton", "flash_attn")),
    ),
    cases=(
        AttentionCase("forward", "float32"),
        AttentionCase("forward", "bfloat16"),
        AttentionCase("train", "float32"),
    ),
    quick=tuple(
        AttentionCase(task, dtype, NH=2, D=16, model="toy")
        for task, dtype in (("forward", "float32"), ("forward", "bfloat16"), ("train", "float32"))
    ),
    audit=AuditPlan(
        cases=(AttentionCase("train", "bfloat16"), AttentionCase("train", "bfloat16", NH=8, D=128)),
        launch=_compile_triton,
        loops={
            "_scale_block_attention_fwd_kernel": _score_loop("forward", 2),
            "_scale_block_attention_dkdv_kernel": _score_loop("dkdv", 4),
            "_scale_block_attention_dq_kernel": _score_loop("dq", 3),
        },
    ),
)
