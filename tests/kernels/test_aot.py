"""The Triton kernels of all ops, compiled for chips that are not here: what they take and what they run on.

An op hands over cases; each is a launch, the kernels that it starts, and what must be true of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from benchmarks.shapes import MODELS
from hitsr_fast.ops import attention_prologue_triton as prologue
from hitsr_fast.ops import group_norm_silu_triton as group_norm
from hitsr_fast.ops import modulated_layer_norm_triton as layer_norm
from hitsr_fast.ops import nearest_code_triton as nearest
from hitsr_fast.ops import packed_codebook as packing
from hitsr_fast.ops import preference_cross_entropy_triton as preference
from hitsr_fast.ops import residual_decode_backward_triton as backward
from hitsr_fast.ops import residual_quantize_triton as residual
from hitsr_fast.ops import sample_codes_triton as sampling
from hitsr_fast.ops import scale_block_attention_triton as attention
from hitsr_fast.reference.residual_quantize import QuantizeCall, phi_table
from tests.kernels import aot
from tests.kernels.aot import AMD, KINDS, TARGETS, TENSOR_CORE, Kernel, check_resources, compile_launches

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
METRICS = ("l2", "cosine")
WIDTHS = (1, 8, 16, 33, 64, 100, 128, 256)  # channels of codes
Kernels = Mapping[str, Kernel]
Property = Callable[[Kernels, str], None]


@dataclass(frozen=True)
class Case:
    """One launch.

    Attributes:
        name: the op's, and what is special.
        launch: calls launchers with tensors of the CPU.
        kernels: names of those that it starts.
        properties: what must be true beside that nothing spills and that shared memory suffices; each is
            asked of the kernels and the target.
        targets: of the compiler.
        quick: targets of those that are compiled in the ordinary run; the others are slow.
        scalar_spills: whether AMD's scalar registers may spill, which go to lanes of vector registers.
    """

    name: str
    launch: Callable[[], object]
    kernels: tuple[str, ...]
    properties: tuple[Property, ...] = ()
    targets: Sequence[str] = tuple(TARGETS)
    quick: Sequence[str] = ()
    scalar_spills: bool = False


# Whether instructions are counted with this Triton: what those before 3.8 make does not spill, but is longer.
COUNTED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
# For sizes of one: Triton makes constants of integers that are 1, which the interpreter does not.
ONE: dict[str, Any] = {"targets": ("sm_90",), "quick": ("sm_90",)}


def opcodes(kernel: Kernel, pattern: str) -> list[str]:
    return [line for line in kernel.instructions() if re.search(pattern, line)]


def only_wide(name: str, instruction: str) -> Property:
    """Eight 16-bit values at a time, on NVIDIA's chips."""

    def check(kernels: Kernels, target: str) -> None:
        if target not in AMD:
            found = opcodes(kernels[name], instruction)
            assert found and all(".128" in text for text in found)

    return check


# --- attention_prologue

PROLOGUE = "_attention_prologue_kernel"


def launch_prologue(
    shape: tuple[int, int, int, int], dtype: torch.dtype = BF16, cached: torch.dtype = BF16, **options: Any
) -> None:
    B, L, NH, D = shape
    start = options.get("start", 16)
    caches = torch.zeros(2, B, start + L, NH, D, dtype=cached)
    table = torch.zeros(L, D // 2, 2) if options.get("rotary", True) else None
    qkv, bias, scale = torch.zeros(B, L, 3 * NH * D, dtype=dtype), torch.zeros(3 * NH * D), torch.zeros(NH)
    prologue.attention_prologue_triton(qkv, caches[0], caches[1], start, bias, scale, table)


def prologue_cases() -> Iterator[Case]:
    case = partial(Case, kernels=(PROLOGUE,))
    stores = only_wide(PROLOGUE, "STG")
    yield case("shipped", partial(launch_prologue, (2, 1024, 16, 64)), properties=(stores,), quick=KINDS)
    yield case("no rotary", partial(launch_prologue, (2, 1024, 16, 64), rotary=False), quick=KINDS)
    yield case("ones", partial(launch_prologue, (1, 1, 1, 2), start=1), **ONE)
    for (heads, D), cached in product([(1, 6), (30, 64), (20, 72), (8, 128), (2, 1024)], (F32, BF16)):
        yield case(f"{heads}x{D} {cached}", partial(launch_prologue, (2, 100, heads, D), F32, cached))


# --- group_norm_silu

MOMENTS, JOIN, APPLY, SUMS, SLOPE = (
    f"_group_norm_{name}_kernel" for name in ("moments", "join", "apply", "sums", "slope")
)


def launch_group_norm(shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: str) -> None:
    x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=FORMATS[layout])
    row = torch.zeros(shape[1], dtype=dtype)
    group_norm.group_norm_silu_triton(x, row, row, groups, 1e-6)
    mean = torch.zeros(shape[0], groups)
    group_norm.group_norm_silu_backward_triton(x, x, row, row, mean, mean)


def group_norm_cases() -> Iterator[Case]:
    case = partial(Case, kernels=(MOMENTS, JOIN, APPLY, SUMS, SLOPE))
    wide = only_wide(MOMENTS, "LDG"), only_wide(APPLY, "STG"), only_wide(SLOPE, "STG")
    yield case("ones", partial(launch_group_norm, (1, 1, 1, 1), 1, F32, "nchw"), **ONE)
    for layout in FORMATS:
        shipped = partial(launch_group_norm, (1, 160, 64, 64), 32, BF16, layout)
        yield case(f"shipped {layout}", shipped, properties=wide, quick=KINDS)
        widths = [(3, 1), (40, 5), (96, 32), (640, 32), (4096, 1)]
        for (C, groups), dtype in product(widths, (F32, F16)):
            launch = partial(launch_group_norm, (2, C, 9, 11), groups, dtype, layout)
            yield case(f"{C}/{groups} {dtype} {layout}", launch)


# --- modulated_layer_norm


def launch_layer_norm(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    B, L, C = shape
    x, row, mean = torch.zeros(shape, dtype=dtype), torch.zeros(B, C, dtype=dtype), torch.zeros(B, L)
    layer_norm.modulated_layer_norm_triton(x, row, row, 1e-6, x.dtype)
    layer_norm.modulated_layer_norm_backward_triton(x, x, row, mean, mean)
    layer_norm.gated_residual_triton(x, x, row)
    layer_norm.gated_residual_backward_triton(x, x, row)
    layer_norm.gated_residual_norm_triton(x, x, row, row, row, 1e-6, x.dtype)


def layer_norm_cases() -> Iterator[Case]:
    names = product(("modulated_layer_norm", "gated_residual"), ("fwd", "bwd"))
    names_of = (*(f"_{op}_{way}_kernel" for op, way in names), "_gated_residual_norm_kernel")
    case = partial(Case, kernels=names_of)
    yield case("shipped", partial(launch_layer_norm, (4, 1024, 1024), BF16), quick=KINDS)
    yield case("ones", partial(launch_layer_norm, (1, 1, 1), F32), **ONE)
    for C, dtype in product((5, 256, 1536, 1920, 4096, 8192), (F32, F16)):
        yield case(f"{C} {dtype}", partial(launch_layer_norm, (4, 100, C), dtype))


# --- nearest_code

ROUND, SCREEN, RECHECK = (f"_nearest_code_{name}_kernel" for name in ("round", "screen", "recheck"))
# Instructions of a thread in a turn of the screen's loop, over its scores, at K = 4096 and C = 32.
SCREEN_BUDGET = {"sm_90": 3.0, "sm_100": 3.0}


def launch_nearest(shape: tuple[int, ...], codes: int, metric: str = "l2", dtype: torch.dtype = F32) -> None:
    x, codebook = torch.zeros(shape, dtype=dtype), torch.zeros(codes, shape[1])
    layout, parts = packing.pack_eager(codebook, metric)
    nearest.nearest_code_triton(x, codebook, list(parts), layout, metric)


def check_nearest(kernels: Kernels, target: str) -> None:
    assert kernels[RECHECK].threads == TARGETS[target].warp_size  # no sum or minimum crosses warps
    assert opcodes(kernels[SCREEN], TENSOR_CORE.pattern)
    assert not opcodes(kernels[RECHECK], TENSOR_CORE.pattern)
    # The definition multiplies and adds in two steps.
    assert not opcodes(kernels[RECHECK], "^(DFMA|V_FMA_F64)")
    assert opcodes(kernels[RECHECK], "^(DADD|V_ADD_F64)")


def check_screen_budget(kernels: Kernels, target: str) -> None:
    kernel, blocks = kernels[SCREEN], nearest.screen_constants(32)
    scores = blocks["BLOCK_N"] * blocks["BLOCK_K"] * blocks["PARTS"]
    assert len(kernel.product_loop()) * kernel.threads / scores <= SCREEN_BUDGET.get(target, 4.0)


def nearest_cases() -> Iterator[Case]:
    case = partial(Case, kernels=(ROUND, SCREEN, RECHECK), properties=(check_nearest,))
    for metric in METRICS:
        shipped = case(f"shipped {metric}", partial(launch_nearest, (65536, 32), 4096, metric), quick=KINDS)
        yield replace(shipped, properties=(check_nearest, check_screen_budget))
        yield case(f"ones {metric}", partial(launch_nearest, (1, 1), 1, metric), **ONE)
        for C in WIDTHS:
            yield case(f"{C} {metric}", partial(launch_nearest, (65536, C), 4096, metric))
    # Triton compiles anew for other dtypes, and for sizes and strides that are 1 or multiples of 16.
    for shape, dtype in product([(65536, 32), (1, 32), (1000, 32), (3, 32, 13, 7)], (F16, BF16)):
        yield case(f"{shape} {dtype}", partial(launch_nearest, shape, 1000, "l2", dtype))


# --- pack_codebook

PACK = ("_pack_codebook_ranges_kernel", "_pack_codebook_kernel")


def pack_cases() -> Iterator[Case]:
    def case(name: str, shape: tuple[int, ...], metric: str, dtype: torch.dtype = F32, **rest: Any) -> Case:
        return Case(name, partial(packing.pack_triton, torch.zeros(shape, dtype=dtype), metric), PACK, **rest)

    for metric in METRICS:
        yield case(f"shipped {metric}", (4096, 32), metric, quick=KINDS)
        yield case(f"ones {metric}", (1, 1), metric, **ONE)
        for C in WIDTHS:
            yield case(f"{C} {metric}", (2, 1000, C), metric)
        for dtype in (F16, BF16):
            yield case(f"{dtype} {metric}", (1000, 33), metric, dtype)


# --- preference_cross_entropy

PREFERENCE = tuple(f"_preference_cross_entropy_{name}_kernel" for name in ("fwd", "logits_bwd", "product"))


def launch_preference(
    shape: tuple[int, int, int], dtype: torch.dtype, of_weight: torch.dtype | None = None, bias: bool = True
) -> None:
    N, C, K = shape
    hidden, weight = torch.zeros(N, C, dtype=dtype), torch.zeros(K, C, dtype=of_weight or dtype)
    added, tokens, values = weight[:, 0] if bias else None, torch.zeros(N, dtype=torch.int64), torch.zeros(N)
    given = (hidden, weight, added, tokens, tokens)
    preference.preference_cross_entropy_triton(*given, 0.1, False)
    preference.preference_cross_entropy_backward_triton(values, values, *given, values, 0.1)


def on_tensor_cores(kernels: Kernels, target: str) -> None:
    for kernel in kernels.values():
        assert opcodes(kernel, TENSOR_CORE.pattern), kernel.name


def preference_cases() -> Iterator[Case]:
    case = partial(Case, kernels=PREFERENCE)
    for dtype in (BF16, F32):
        launch = partial(launch_preference, (3452, 1024, 4096), dtype)
        properties = (on_tensor_cores,) if dtype == BF16 else ()
        yield case(f"shipped {dtype}", launch, properties=properties, quick=KINDS)
    yield case("ones", partial(launch_preference, (1, 1, 1), F32), **ONE)
    for dtype, C, bias in product((F16, BF16, F32), (100, 256), (True, False)):
        yield case(f"{C} {dtype} {bias}", partial(launch_preference, (100, C, 130), dtype, None, bias))
    yield case("mixed", partial(launch_preference, (3452, 1024, 4096), BF16, F32))


# --- residual_quantize: one kernel a launch


@dataclass(frozen=True)
class Search:
    """One launch of the search."""

    batch: int
    side: int
    inputs: bool
    metric: str = "l2"
    channels: int = 32
    dtype: torch.dtype = F32

    def __call__(self) -> None:
        B, C, side = self.batch, self.channels, self.side
        codebook, z = torch.zeros(4096, C), torch.zeros(B, C, 32, 32, dtype=self.dtype)
        indices = torch.zeros(B, side * side, dtype=torch.int64)
        bank = (codebook, torch.zeros(4, C, C, 3, 3), torch.zeros(4, C))
        layout, parts = packing.pack_eager(codebook, self.metric)
        search = residual._Searcher(
            QuantizeCall(
                z, *bank, list(parts), layout, [side, side], [0], 0.5, None, self.metric, self.inputs, False
            )
        )
        inputs = torch.zeros(B, side * side, C) if self.inputs else None
        search(z, residual.Scale(side, side, 0, 0), indices, z.float(), inputs)

    def check(self, kernels: Kernels, target: str) -> None:
        (kernel,) = kernels.values()
        assert not re.search(r"V_(READ|WRITE)LANE", "\n".join(kernel.product_loop()))
        # The definition multiplies and adds in two steps.
        assert not opcodes(kernel, "DFMA|V_FMA_F64")
        assert opcodes(kernel, "DADD|V_ADD_F64")
        # What programs exchange is written before it is announced, and read from no cache that may be stale.
        assert not opcodes(kernel, "LDG.*CONSTANT")
        assert not opcodes(kernel, "GLOBAL_ATOMIC")
        if opcodes(kernel, "ATOMG"):
            text = "\n".join(kernel.instructions())
            assert re.search("MEMBAR.*GPU(.|\n)*ATOMG(.|\n)*CCTL.IVALL", text)

    def check_budget(self, kernels: Kernels, target: str) -> None:
        (kernel,) = kernels.values()
        chip = TARGETS[target]
        capability = int(chip.arch) if chip.backend == "cuda" else 0
        blocks = residual.search_constants(
            self.channels, self.metric, self.batch * self.side**2, 4, capability
        )
        scores = blocks["BLOCK_N"] * blocks["BLOCK_K"] * blocks["PARTS"]
        assert len(kernel.product_loop()) * kernel.threads / scores <= (
            5.5 if target == "sm_120" else SCREEN_BUDGET.get(target, 4.0)
        )


def exchanges(kernels: Kernels, target: str) -> None:
    """Programs share the codes out."""
    (kernel,) = kernels.values()
    assert target != "sm_90" or opcodes(kernel, "ATOMG")


@dataclass(frozen=True)
class Update:
    """One launch of the update."""

    ratio: float = 0.5
    first: bool = False
    residual: bool = True
    packed: bool = True
    channels: int = 32
    dtype: torch.dtype = F32
    batch: int = 8

    def __call__(self) -> None:
        C, out = self.channels, torch.zeros(self.batch, self.channels, 32, 32)
        bank = torch.zeros(4, C, C, 3, 3, dtype=self.dtype)
        codebook, bias = torch.zeros(4096, C, dtype=self.dtype), torch.zeros(4, C, dtype=self.dtype)
        if self.packed:
            bank = bank.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        update = residual._Updater(codebook, bank, bias, self.ratio, out)
        indices = torch.zeros(self.batch, 3452, dtype=torch.int64)
        self.run(update, indices, out)

    def run(self, update: residual._Updater, indices: Tensor, out: Tensor) -> None:
        before, left = None if self.first else out, out if self.residual else None
        update(residual.Scale(8, 8, 52, 1), indices, before, out, left, left)

    def check(self, kernels: Kernels, target: str) -> None:
        (kernel,) = kernels.values()
        products = opcodes(kernel, TENSOR_CORE.pattern)
        if target in AMD:  # whose matrix cores have a product of true float32
            assert bool(products) == (self.ratio != 0)
            assert all(re.match(r"V_MFMA_F32_\d+X\d+X\d+_(\dB_)?F32", line) for line in products)
        else:
            assert not products
            if self.ratio != 0:
                share = max(sum("FFMA" in line for line in loop) / len(loop) for loop in kernel.loops())
                assert share > 0.55, share


class Decode(Update):
    """One launch of a whole decoding."""

    def run(self, update: residual._Updater, indices: Tensor, out: Tensor) -> None:
        update.sum([residual.Scale(4, 4, 0, 0), residual.Scale(32, 32, 16, 1)], indices, out)


def launch_pool(side: int, C: int = 32) -> None:
    residual._pool(torch.zeros(2, C, 32, 32), residual.Scale(side, side, 0, 0), torch.zeros(2, side**2, C))


def residual_cases() -> Iterator[Case]:
    def case(kernel: str, launch: Callable[[], object], *properties: Property, **rest: Any) -> Case:
        name = f"{kernel} {launch}" if isinstance(launch, (Search, Update)) else f"{kernel} {launch.args}"
        names = ("_residual_decode_kernel" if kernel == "decode" else f"_residual_quantize_{kernel}_kernel",)
        return Case(name, launch, names, properties, scalar_spills=True, **rest)

    def search(*arguments: Any, **rest: Any) -> Case:
        launch = Search(*arguments)
        large = launch.batch == 64 and launch.channels == 32 and launch.dtype == F32
        more = (launch.check_budget,) if large else (exchanges,) if arguments == (1, 4, False) else ()
        return case("search", launch, launch.check, *more, **rest)

    def update(launch: Update, **rest: Any) -> Case:
        return case("update", launch, launch.check, **rest)

    # All that HIT's scales ask for: few rows and many, bins of a few places and of more.
    quick = {"quick": ("sm_90",)}
    yield search(1, 4, False, **quick)
    yield search(64, 28, True, **quick)
    yield update(Update(), **quick)
    yield update(Update(0.0), **quick)
    yield update(Update(batch=1), **quick)
    for launch in (Decode(), Decode(batch=1)):
        yield case("decode", launch, launch.check, **quick)
    for launch in (
        Decode(0.0),
        Decode(dtype=BF16),
        Decode(channels=8),
        Decode(channels=100),
        Decode(channels=256),
    ):
        yield case("decode", launch, launch.check)
    yield case("pool", partial(launch_pool, 28), **quick)
    for batch, side, inputs in [
        (1, 1, True),
        (1, 4, True),
        (1, 10, True),
        (1, 28, True),
        (384, 4, True),
        (64, 14, True),
        (64, 28, False),
    ]:
        yield search(batch, side, inputs)
    for shape in [
        (1, 4, True),
        (1, 4, False),
        (1, 28, True),
        (64, 14, True),
        (64, 28, False),
        (64, 28, True),
    ]:
        yield search(*shape, "cosine")
    for C, metric in product(WIDTHS, METRICS):
        if C != 32:
            yield search(1, 4, True, metric, C)
            yield search(64, 14, True, metric, C)
    for dtype, batch in product((F16, BF16, torch.float64), (1, 64)):
        yield search(batch, 10, False, "l2", 32, dtype)
    for dtype in (F32, F16, BF16):
        if dtype != F32:
            yield update(Update(dtype=dtype))
            yield update(Update(0.0, dtype=dtype))
        yield update(Update(first=True, dtype=dtype))
        yield update(Update(residual=False, packed=False, dtype=dtype))
    for C in WIDTHS:
        for ratio, packed in product((0.5, 0.0), (True, False)):
            if C != 32 or not packed:
                yield update(Update(ratio, packed=packed, channels=C))
        yield update(Update(packed=False, channels=C, batch=1))
        for side in (1, 4, 28):
            yield case("pool", partial(launch_pool, side, C))


# --- residual_decode_backward

ALWAYS, WITH_PHI = ("reach", "across", "codes", "runs"), ("phi", "weight", "bias")


@dataclass(frozen=True)
class Backward:
    """All of its kernels."""

    channels: int = 32
    dtype: torch.dtype = F32
    each: bool = True
    ratio: float = 0.5
    batch: int = 2
    scales: tuple[int, ...] = MODELS["hit-d16"].scales
    K: int = 4096

    def __call__(self) -> None:
        B, C, side = self.batch, self.channels, self.scales[-1]
        maps = torch.zeros(len(self.scales) + 1, B, C, side, side)
        indices = torch.zeros(B, sum(scale * scale for scale in self.scales), dtype=torch.int64)
        bank = torch.zeros(self.K, C, dtype=self.dtype), torch.zeros(4, C, C, 3, 3, dtype=self.dtype)
        flat = [side for scale in self.scales for side in (scale, scale)]
        given = maps[0], maps[1:] if self.each else maps[:0], indices
        backward.residual_decode_backward_triton(*given, *bank, flat, phi_table(len(self.scales)), self.ratio)

    def check(self, kernels: Kernels, target: str) -> None:
        """Products are of true float32: sums of thousands of terms, which tensor cores would round down."""
        for name, kernel in kernels.items():
            products = opcodes(kernel, TENSOR_CORE.pattern)
            multiplies = self.ratio != 0 and name in map(backward_kernel, ("codes", "phi"))
            if target in AMD:
                assert bool(products) == multiplies, name
                assert all(re.match(r"V_MFMA_F32_\d+X\d+X\d+_(\dB_)?F32", line) for line in products)
            else:
                assert not products, name
                if multiplies and self.channels >= 32:
                    longest = max(kernel.loops(), key=len)
                    assert sum("FFMA" in line for line in longest) / len(longest) > 0.55, name


def backward_kernel(name: str) -> str:
    return f"_residual_decode_backward_{name}_kernel"


def backward_cases() -> Iterator[Case]:
    def case(name: str, launch: Backward, **rest: Any) -> Case:
        names = ALWAYS + (WITH_PHI if launch.ratio != 0 else ())
        return Case(name, launch, tuple(map(backward_kernel, names)), (launch.check,), **rest)

    yield case("shipped", Backward(), quick=("sm_90", "gfx942"))
    yield case("ones", Backward(1, batch=1, scales=(1,), K=1), **ONE)
    yield case("no phi", Backward(ratio=0.0))
    for dtype, each in product((F16, BF16, F32), (True, False)):
        yield case(f"{dtype} {each}", Backward(dtype=dtype, each=each))
    for C in WIDTHS:
        yield case(f"{C}", Backward(C, batch=1))


# --- sample_codes

# Products and sums of float32 in one step, which the definition has none of.
FUSED = r"\b(FFMA|V_FMA_F32|V_FMAC_F32|V_PK_FMA_F32)"


def launch_sampling(
    shape: tuple[int, int] = (1024, 4096),
    dtype: torch.dtype = F32,
    *,
    greedy: bool = False,
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    temperature: float = 0.9,
    in_memory: bool = False,
) -> None:
    logits = torch.zeros(shape, dtype=dtype)
    settings = torch.zeros(5, dtype=torch.int64) if in_memory else None
    state = None if greedy else torch.zeros(2, dtype=torch.int64)
    uncond = logits if guidance > 0 else None
    sampling.sample_codes_triton(logits, uncond, state, guidance, top_k, top_p, temperature, settings)


def check_not_fused(kernels: Kernels, target: str) -> None:
    (kernel,) = kernels.values()
    assert not opcodes(kernel, FUSED)


def sampling_cases() -> Iterator[Case]:
    case = partial(Case, kernels=("_sample_codes_kernel",), properties=(check_not_fused,))
    yield case("shipped", launch_sampling, quick=KINDS)
    yield case("numbers in memory", partial(launch_sampling, in_memory=True), quick=KINDS)
    for greedy in (False, True):
        launch = partial(launch_sampling, (1, 1), greedy=greedy, top_k=1)
        yield case(f"ones {'greedy' if greedy else 'drawn'}", launch, **ONE)
    for codes, dtype in product((7, 64, 1000, 8192, 16384), (F32, BF16)):
        yield case(f"{codes} {dtype}", partial(launch_sampling, (1024, codes), dtype))
    others: list[dict[str, Any]] = [
        {"greedy": True},
        {"guidance": 0.0},
        {"greedy": True, "in_memory": True},
        {"guidance": 0.0, "in_memory": True},
    ]
    for options in others:
        yield case(f"{options}", partial(launch_sampling, **options))


# --- scale_block_attention

FORWARD, DKDV, DQ, DELTA = (
    f"_scale_block_attention_{name}_kernel" for name in ("fwd", "dkdv", "dq", "delta")
)
DECODE, COMBINE = "_cached_attention_kernel", "_cached_attention_combine_kernel"
TRAINING = {FORWARD: "forward", DKDV: "dkdv", DQ: "dq"}
BLOCKS = MODELS["hit-d16"].blocks  # of HIT-VAR at 512 pixels
# Instructions of a thread in a turn of the loop over whole tiles, over its scores: bfloat16, D = 64.
ATTENTION_BUDGET = {
    "sm_80": {FORWARD: 12.2, DKDV: 16.4, DQ: 10.9},
    "sm_86": {FORWARD: 12.2, DKDV: 16.4, DQ: 11.2},
    "sm_89": {FORWARD: 12.2, DKDV: 16.4, DQ: 11.2},
    "sm_90": {FORWARD: 8.95, DKDV: 10.5, DQ: 8.9},
    "sm_100": {FORWARD: 7.5, DKDV: 9.5, DQ: 10.2},
    "sm_103": {FORWARD: 7.5, DKDV: 9.5, DQ: 10.2},
    "sm_120": {FORWARD: 11.6, DKDV: 16.4, DQ: 10.9},
    "gfx942": {FORWARD: 12.9, DKDV: 36.8, DQ: 14.0},
    "gfx950": {FORWARD: 8.1, DKDV: 16.2, DQ: 7.6},
}
LOOP_CONTROL = 16  # comparisons that a loop needs for itself: more would be those of a mask, one a score


@dataclass(frozen=True)
class Attention:
    """All kernels, or those of a cache alone, which see some number of queries; of slices of one tensor."""

    head_dim: int
    dtype: torch.dtype
    blocks: tuple[int, ...] = tuple(BLOCKS)
    heads: int = 16
    queries: int = 36
    training: bool = True

    def __call__(self) -> None:
        T, shape = sum(self.blocks), (self.heads, self.head_dim)
        q, k, v = torch.zeros(1, T, 3, *shape, dtype=self.dtype).unbind(2)
        out, lse = torch.zeros(1, T, *shape, dtype=self.dtype), torch.zeros(1, self.heads, T)
        if self.training:
            blocks = list(self.blocks)
            attention.scale_block_attention_triton(q, k, v, blocks, 0.125)
            attention.scale_block_attention_backward_triton(out, q, k, v, out, lse, blocks, 0.125)
        attention.cached_attention_triton(q[:, : self.queries], out, out, T, 0.125)

    def check_loops(self, kernels: Kernels, target: str) -> None:
        """Both loops multiply on tensor cores, that over whole tiles without a mask."""
        for name in {*TRAINING, DECODE} & set(kernels):
            whole, _ = kernels[name].product_loops()
            comparisons = [line for line in whole if re.search(r"\b(ISETP|V_CMP_\w+_I32)", line)]
            assert len(comparisons) <= LOOP_CONTROL, name
            if target not in AMD and self.dtype != F32:  # there rounding and splitting select, too
                assert not any("FSEL" in line for line in whole), name
                assert opcodes(kernels[name], r"\bFSEL\b"), name


def check_attention_budget(kernels: Kernels, target: str) -> None:
    chip = attention.family(TARGETS[target].backend, TARGETS[target].arch)
    for name, kind in TRAINING.items():
        blocks = attention.constants(kind, BF16, 64, chip)
        whole, _ = kernels[name].product_loops()
        per_score = len(whole) * kernels[name].threads / (blocks["BLOCK_M"] * blocks["BLOCK_N"])
        assert not COUNTED or per_score <= ATTENTION_BUDGET[target][name], (name, per_score)


def attention_cases() -> Iterator[Case]:
    trained, cache = (*TRAINING, DELTA), (DECODE, COMBINE)
    launch = Attention(64, BF16)
    properties = (launch.check_loops, check_attention_budget)
    yield Case("trained", launch, trained + cache, properties, quick=("sm_90", "sm_120"))
    yield Case("ones", Attention(1, BF16, (1,), 1, 1), (*trained, DECODE), **ONE)
    for D, dtype, queries in product((16, 32, 48, 64, 96, 128), (BF16, F16, F32), (1, 20, 100, 1024)):
        training = queries == 1
        launch = Attention(D, dtype, queries=queries, training=training)
        # So many queries fill a GPU: no keys are shared out.
        names = (trained if training else ()) + (cache if queries < 1024 else (DECODE,))
        yield Case(f"{D} {dtype} {queries}", launch, names, (launch.check_loops,))


# --- all of them

OPS: dict[str, Callable[[], Iterator[Case]]] = {
    "attention_prologue": prologue_cases,
    "group_norm_silu": group_norm_cases,
    "modulated_layer_norm": layer_norm_cases,
    "nearest_code": nearest_cases,
    "pack_codebook": pack_cases,
    "preference_cross_entropy": preference_cases,
    "residual_decode_backward": backward_cases,
    "residual_quantize": residual_cases,
    "sample_codes": sampling_cases,
    "scale_block_attention": attention_cases,
}


def parameters() -> Iterator[Any]:
    for op, cases in OPS.items():
        for case in cases():
            for target in case.targets:
                marks = [] if target in case.quick else [pytest.mark.slow]
                yield pytest.param(case, target, marks=marks, id=f"{op}-{case.name}-{target}")


@pytest.mark.parametrize(("case", "target"), list(parameters()))
def test_kernels(case: Case, target: str, tmp_path: Path) -> None:
    kernels = compile_launches(TARGETS[target], case.launch, tmp_path)
    assert set(kernels) == set(case.kernels)
    for kernel in kernels.values():
        check_resources(kernel, target, scalar_spills=case.scalar_spills)
    for check in case.properties:
        check(kernels, target)


def test_every_kernel_is_compiled() -> None:
    """Of every folder of kernels."""
    folders = {path.parent.name for path in (Path(__file__).parents[2] / "kernels").glob("*/__init__.py")}
    assert folders == set(OPS)


# --- that the checks can fail


def test_a_spill_of_the_screen_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile in one part takes more registers than a thread of sm_100 has."""
    blocks = nearest.screen_constants(32) | {"BLOCK_K": 128, "PARTS": 1}
    monkeypatch.setattr(nearest, "screen_constants", lambda channels: blocks)
    kernels = compile_launches(TARGETS["sm_100"], partial(launch_nearest, (65536, 32), 4096), tmp_path)
    assert kernels[SCREEN].resources().spilled > 0


def test_a_spill_of_attention_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the keys that the tile of a forward has room for."""
    shipped = attention.constants
    monkeypatch.setattr(attention, "constants", lambda *args: shipped(*args) | {"BLOCK_N": 128})
    q = torch.zeros(1, 4476, 16, 64, dtype=BF16)
    kernels = compile_launches(
        TARGETS["sm_90"], lambda: attention.scale_block_attention_triton(q, q, q, BLOCKS, 0.125), tmp_path
    )
    assert kernels[FORWARD].resources().spilled > 0


def test_other_numbers_are_no_other_kernel(tmp_path: Path) -> None:
    def launch() -> None:
        for top_k, top_p, temperature in product((0, 1, 16, 900, 4096), (0.0, 0.96, 1.0), (0.5, 1.0)):
            launch_sampling(top_k=top_k, top_p=top_p, temperature=temperature)

    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "Kernel", lambda found, *_: compiled.append(found) or SimpleNamespace(name=""))
        compile_launches(TARGETS["sm_90"], launch, tmp_path)
    assert len(compiled) == 30 and len(set(map(id, compiled))) == 1


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942"])
def test_a_fused_step_is_seen(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_OPTIONS", {"num_stages": 1, "enable_fp_fusion": True})
    (kernel,) = compile_launches(TARGETS[target], launch_sampling, tmp_path).values()
    assert opcodes(kernel, FUSED)
