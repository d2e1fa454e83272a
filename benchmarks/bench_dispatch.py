"""What a call of an op costs where tensors are small: checks, the choice of a backend, PyTorch's own part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._harness import Benchmark, Call, Case, Inputs, Provider
from benchmarks._providers import rows_off
from benchmarks.ops.bench_modulated_layer_norm import norm, residual
from benchmarks.ops.bench_nearest_code import distance_matrix_argmin
from benchmarks.peers.var_quantizer import EagerQuantizer
from benchmarks.shapes import MODELS
from hitsr_fast import __version__, extension, ops
from hitsr_fast.ops import active_instruction_set

_attend = F.scaled_dot_product_attention

_HIT = MODELS["hit-d16"]
_ROWS, _SIDES = 16, (1, 2, 4)
_TOKENS, _PHI = sum(side * side for side in _SIDES), [0, 2, 3]
_PAIRS = [side for side in _SIDES for _ in range(2)]
_BANK = ((64, _HIT.C), (4, _HIT.C, _HIT.C, 3, 3), (4, _HIT.C))  # codebook, phi_weight, phi_bias
_TOKENS_OF_HEADS = (1, _ROWS, 2, _HIT.D)


class Implementations(NamedTuple):
    """Calls of an op as plain PyTorch, as the extension's private op, and by its public function."""

    eager: Call
    kernel: Call
    public: Call


@dataclass(frozen=True)
class SmallCall:
    """Shapes of an op's tensors, and what calls it with them."""

    shapes: tuple[tuple[int, ...], ...]
    build: Callable[..., Implementations]


CALLS: dict[str, SmallCall] = {}


def _small(
    *shapes: tuple[int, ...],
) -> Callable[[Callable[..., Implementations]], Callable[..., Implementations]]:
    """Puts a function into `CALLS` under its name."""

    def put(build: Callable[..., Implementations]) -> Callable[..., Implementations]:
        CALLS[build.__name__] = SmallCall(shapes, build)
        return build

    return put


def _private(op: str, *args: Any) -> Call:
    """A call of the extension's op, on the instruction set that the dispatch takes."""
    if extension.unavailable() is not None or not hasattr(torch.ops.hitsr_fast, f"_{op}"):
        return lambda: None
    function, isa = getattr(torch.ops.hitsr_fast, f"_{op}"), active_instruction_set()
    return lambda: function(*args, isa)


@_small((_ROWS, _HIT.C), _BANK[0])
def nearest_code(x: Tensor, codebook: Tensor) -> Implementations:
    prepared = ops.prepare_codebook(codebook)
    return Implementations(
        lambda: distance_matrix_argmin(x, codebook),
        _private("nearest_code_search", x[None, None, None], list(prepared.parts), len(codebook), False),
        lambda: ops.nearest_code(x, prepared),
    )


@_small((1, _HIT.C, _SIDES[-1], _SIDES[-1]), *_BANK)
def residual_quantize(z: Tensor, *bank: Tensor) -> Implementations:
    prepared, eager = ops.prepare_codebook(bank[0]), EagerQuantizer(*bank, _SIDES, ratio=0.5)
    given = (z, *bank, list(prepared.parts), _PAIRS, _PHI, 0.5, None, False, False, False)
    return Implementations(
        lambda: eager.encode(z).maps[-1],
        _private("residual_quantize", *given),
        lambda: (
            ops.residual_quantize(z, *bank, scales=_SIDES, phi_index=_PHI, prepared=prepared).reconstruction
        ),
    )


@_small(*_BANK)
def residual_decode(*bank: Tensor) -> Implementations:
    eager, side = EagerQuantizer(*bank, _SIDES, ratio=0.5), _SIDES[-1]
    indices = torch.arange(_TOKENS, device=bank[0].device)[None]
    codes = indices.split([side * side for side in _SIDES], dim=1)
    return Implementations(
        lambda: eager.decode([eager.lookup(k, (side, side)) for k, side in zip(codes, _SIDES, strict=True)])[
            0
        ],
        _private("residual_decode", indices, *bank, _PAIRS, _PHI, [side, side], 0.5, False, False),
        lambda: ops.residual_decode(indices, *bank, scales=_SIDES, phi_index=_PHI, size=side),
    )


@_small((1, _HIT.C, _SIDES[-1], _SIDES[-1]), *_BANK)
def residual_step(start: Tensor, codebook: Tensor, weight: Tensor, bias: Tensor) -> Implementations:
    """Of the first scale. What is written to grows with each call."""
    eager = EagerQuantizer(codebook, weight, bias, _SIDES, ratio=0.5)
    indices, f_hat = torch.zeros(1, 1, dtype=torch.int64, device=start.device), start.clone()
    phi, first, second = (weight[0], bias[0]), *_SIDES[:2]
    return Implementations(
        lambda: eager.step(0, f_hat, eager.lookup(indices, (first, first))),
        _private("residual_step", f_hat, indices, codebook, *phi, [first] * 2, [second] * 2, 0.5),
        lambda: ops.residual_step(f_hat, indices, codebook, *phi, scale=first, next_scale=second),
    )


@_small((_ROWS, 64))
def sample_codes(logits: Tensor) -> Implementations:
    """Greedy."""
    return Implementations(
        lambda: logits.argmax(-1),
        _private("sample_codes", logits, None, None, 1.0, 0.0, 1.0, 1, 0),
        lambda: ops.sample_codes(logits, top_k=1),
    )


@_small((1, _ROWS, _HIT.width), (1, _HIT.width), (1, _HIT.width))
def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Implementations:
    return Implementations(
        lambda: norm(x, scale, shift),
        _private("modulated_layer_norm", x, scale, shift, 1e-6, x.dtype),
        lambda: ops.modulated_layer_norm(x, scale, shift),
    )


@_small((1, _ROWS, _HIT.width), (1, _ROWS, _HIT.width), (1, _HIT.width))
def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Implementations:
    return Implementations(
        lambda: residual(x, y, gate),
        _private("gated_residual", x, y, gate),
        lambda: ops.gated_residual(x, y, gate),
    )


@_small((1, _ROWS, _HIT.width), (1, _ROWS, _HIT.width), (1, _HIT.width), (1, _HIT.width), (1, _HIT.width))
def gated_residual_norm(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Implementations:
    """The eager lines give the norm last, as the op does; what is compared is the sum."""

    def eager() -> Tensor:
        total = residual(x, y, gate)
        norm(total, scale, shift)
        return total

    return Implementations(
        eager,
        _private("gated_residual_norm", x, y, gate, scale, shift, 1e-6, x.dtype),
        lambda: ops.gated_residual_norm(x, y, gate, scale, shift),
    )


@_small((_ROWS, _HIT.width), (64, _HIT.width), (64,))
def preference_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor) -> Implementations:
    """What is compared is the loss."""
    target = torch.arange(_ROWS, device=hidden.device)
    rejected = target.flip(0)

    def eager() -> Tensor:
        logits = F.linear(hidden, weight, bias)
        chosen, refused = (logits.gather(1, tokens[:, None]) for tokens in (target, rejected))
        chosen.sub_(refused)
        return F.cross_entropy(logits, target, reduction="none")

    return Implementations(
        eager,
        _private("preference_cross_entropy", hidden, weight, bias, target, rejected, 0.0, False),
        lambda: ops.preference_cross_entropy(hidden, weight, bias, target, rejected),
    )


@_small((1, _ROWS, 3 * 2 * _HIT.D), (3 * 2 * _HIT.D,))
def attention_prologue(qkv: Tensor, bias: Tensor) -> Implementations:
    """Of tokens that are the first in the cache; the eager lines add the bias, too."""
    k_cache, v_cache = (qkv.new_empty(_TOKENS_OF_HEADS) for _ in range(2))
    scale = qkv.new_full((2,), 4.0)

    def eager() -> Tensor:
        q, k, v = (qkv + bias).view(1, _ROWS, 3, 2, _HIT.D).unbind(2)
        k_cache.copy_(F.normalize(k, dim=-1))
        v_cache.copy_(v)
        return F.normalize(q, dim=-1).mul_(scale[:, None])

    return Implementations(
        eager,
        _private("attention_prologue", qkv, k_cache, v_cache, 0, bias, scale, None),
        lambda: ops.attention_prologue(qkv, k_cache, v_cache, 0, bias=bias, q_scale=scale),
    )


@_small((1, 32, 4, 4), (32,), (32,))
def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Implementations:
    return Implementations(
        lambda: F.silu(F.group_norm(x, 8, weight, bias, 1e-6)),
        _private("group_norm_silu", x, weight, bias, 8, 1e-6),
        lambda: ops.group_norm_silu(x, weight, bias, 8, eps=1e-6),
    )


@_small(*(_TOKENS_OF_HEADS,) * 3)
def scale_block_attention(q: Tensor, k: Tensor, v: Tensor) -> Implementations:
    """Two blocks."""
    half, scale = _ROWS // 2, _HIT.D**-0.5

    def eager() -> Tensor:
        heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
        first = _attend(*(tensor[:, :, :half] for tensor in heads_first))
        last = _attend(heads_first[0][:, :, half:], *heads_first[1:])
        return torch.cat([first, last], dim=2).transpose(1, 2)

    return Implementations(
        eager,
        _private("scale_block_attention", q, k, v, [half, half], scale),
        lambda: ops.scale_block_attention(q, k, v, block_lengths=[half, half]),
    )


@_small(*(_TOKENS_OF_HEADS,) * 3)
def cached_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Implementations:
    return Implementations(
        lambda: _attend(*(tensor.transpose(1, 2) for tensor in (q, k_cache, v_cache))).transpose(1, 2),
        _private("scale_block_attention", q, k_cache, v_cache, [_ROWS], _HIT.D**-0.5),
        lambda: ops.cached_attention(q, k_cache, v_cache, _ROWS),
    )


@dataclass(frozen=True)
class DispatchCase(Case):
    """One call of an op."""

    call: str

    @property
    def items(self) -> int:
        return 1

    @property
    def flops(self) -> int:
        return 0

    def inputs(self, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(shape, generator=generator).to(device) for shape in CALLS[self.call].shapes)

    def expected(self, *inputs: Tensor) -> Tensor:
        return _build("eager")(self, inputs)()

    def wrong_rows(self, result: Any, expected: Tensor) -> int:
        """1 if the first result is off."""
        found = result if isinstance(result, Tensor) else result[0]
        return rows_off([found.view_as(expected)], [expected.double()], torch.float32, rows=0)


def _build(name: str) -> Callable[[DispatchCase, Inputs], Call]:
    def build(case: DispatchCase, inputs: Inputs) -> Call:
        with torch.no_grad():
            function = getattr(CALLS[case.call].build(*inputs), name)
        return torch.no_grad()(function)  # type: ignore[no-any-return]

    return build


def _no_kernel(case: DispatchCase, inputs: Inputs) -> str | None:
    return extension.unavailable() or (None if inputs[0].is_cpu else "the extension takes CPU tensors")


_CASES = tuple(DispatchCase(op) for op in CALLS)

BENCHMARK = Benchmark(
    op="dispatch",
    providers=(
        Provider("eager", _build("eager")),
        Provider(
            "kernel",
            _build("kernel"),
            _no_kernel,
            lambda: f"{__version__} {active_instruction_set()}",
            ours=True,
        ),
        Provider("public", _build("public"), version=lambda: __version__, ours=True),
    ),
    cases=_CASES,
    quick=_CASES,
    repeats=1001,
)
