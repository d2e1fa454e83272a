"""Predicted times of the ops on GPUs, with their arithmetic: `python -m benchmarks.predictions`.

Nothing here was measured. docs/gpu.md shows the table, so that a measurement can be held against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks._audit import CHIPS, Chip
from benchmarks.bench_degradation import DegradationCase
from benchmarks.shapes import MODELS, ModelShape
from hitsr_fast.data import degradation
from hitsr_fast.data.degradation_config import PRESETS as PRESETS_OF_DEGRADATION
from hitsr_fast.models import HitVar
from hitsr_fast.models.hit_var.config import PRESETS

SHOWN = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# Of main memory, TB/s, from data sheets.
BANDWIDTH: Mapping[str, float] = {
    **{"sm_80": 2.04, "sm_86": 0.94, "sm_89": 1.01, "sm_90": 3.35, "sm_100": 8.0},
    **{"sm_103": 8.0, "sm_120": 1.79, "gfx942": 5.3, "gfx950": 8.0},
}
# Assumed: what is reached of the peaks, and what a kernel of a graph takes beside its work.
OF_BANDWIDTH, OF_PRODUCTS, OF_LANES, LAUNCH_US = 0.8, 0.4, 0.5, 2.5
PER_SCORE = 3.0  # instructions of a lane for each score of the search: the budget that the audit holds
HIT = MODELS["hit-d16"]
# Of `degrade` for 16 photos of 128 pixels: operations, and MB of all that they read and write (`counted`).
# Of its Fourier transforms, 2.5 log2(n) multiply-adds for each of n places.
DEGRADE = DegradationCase("x4plus", 16, 128)
DEGRADE_LAUNCHES, DEGRADE_MB, DEGRADE_LANES = 500, 1290.0, 0.5


@dataclass(frozen=True)
class Work:
    """What one call does.

    Attributes:
        op, case: its name and its sizes.
        launches: kernels, one after the other.
        megabytes: that go to and from main memory.
        products: GFLOP on tensor cores in 16 bits.
        lanes: billions of instructions of lanes, one multiply-add each or one of the search's.
        formula: of the largest term, in words.
    """

    op: str
    case: str
    launches: int
    megabytes: float
    products: float
    lanes: float
    formula: str

    def milliseconds(self, target: str) -> float:
        """On a chip: launches, and then the longest of memory, tensor cores and lanes."""
        chip: Chip = CHIPS[target]
        memory = self.megabytes / 1e6 / (BANDWIDTH[target] * OF_BANDWIDTH)
        products = self.products / 1e3 / (chip.teraflops * OF_PRODUCTS)
        lanes = self.lanes / (chip.units * chip.lanes * chip.gigahertz * OF_LANES)
        return 1e3 * max(memory, products, lanes) + self.launches * LAUNCH_US / 1e3


def _quantizer(model: ModelShape, B: int) -> Iterator[Work]:
    T, places, C, S = model.tokens, model.scales[-1] ** 2, model.C, len(model.scales)
    scores, phi = B * T * model.K / 1e9, B * S * places * 9 * C * C / 1e9
    maps = B * places * C * 4 / 1e6
    yield Work(
        *("residual_quantize", f"HIT-VAR, B={B}"),
        *(2 * S + 2, 4 * S * maps, 2 * scores * C, PER_SCORE * scores + phi),
        "B T K scores of 3 instructions, and phi's 9 C² multiply-adds of each place of S maps",
    )
    across = 34 / 174 * 0.087 * B  # of the resampling; the rest are products at the size of each scale
    yield Work(
        *("residual_decode_backward", f"HIT-VAR, B={B}, gradients per scale"),
        *(18, 11.4 * B, 0.0, B * 2 * 9 * C * C * T / 1e9 + across),
        "2 · 9 C² T multiply-adds, for codes and weights",
    )


class _Operations(TorchDispatchMode):
    """Counts those that are not views, and the bytes of the tensors that they take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        if not func.is_view:
            self.number += 1
            tensors = (leaf for leaf in tree_leaves((args, given, result)) if isinstance(leaf, Tensor))
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def counted(case: DegradationCase) -> tuple[int, float]:
    """Operations and MB of a batch in one canvas, as a GPU has it; the draws, made before, are not in it."""
    config = PRESETS_OF_DEGRADATION[case.preset]
    (hr,), plans = case.inputs(torch.device("cpu")), case.plans()
    with torch.no_grad(), _Operations() as found:
        degradation._carry_out(degradation._sharp(hr, config), plans, config)
    return found.number, found.bytes / 1e6


def _degradations() -> Iterator[Work]:
    for side in (DEGRADE.side, 512):
        times = (side / DEGRADE.side) ** 2
        yield Work(
            *("degrade", f"B={DEGRADE.B}, {side} px, {DEGRADE.preset}, without its draws", DEGRADE_LAUNCHES),
            *(times * DEGRADE_MB, 0.0, times * DEGRADE_LANES),
            "tensors of each operation, counted at 128 px",
        )


def works() -> Iterator[Work]:
    """The rows of the table."""
    N, K, C = 65536, HIT.K, HIT.C
    yield Work(
        *("nearest_code", f"N={N}, K={K}, C={C}, prepared", 3, N * C * 10 / 1e6),
        *(2 * N * K * C / 1e9, PER_SCORE * N * K / 1e9, "N K scores of 3 instructions"),
    )
    for B in (1, 8, 64):
        yield from _quantizer(HIT, B)
    rows, width, B = HIT.tokens + HIT.prefix, HIT.width, 4
    flops = B * HIT.heads * HIT.pairs * 4 * HIT.D / 1e9
    memory = 4 * B * rows * width * 2 / 1e6
    attention = "scale_block_attention", f"HIT-d16, one layer, B={B}, bfloat16"
    yield Work(*attention, 1, memory, flops, 0.0, "4 D for each pair that sees each other, of each head")
    yield Work(
        *("scale_block_attention_backward", attention[1], 3, 2 * memory, 2.5 * flops, 0.0),
        "2.5 times the forward pass",
    )
    stream = rows * width * 4 / 1e6
    yield Work(
        *("gated_residual_norm", "HIT-d16, all rows of an image, float32", 1, 3 * stream, 0.0, 0.0),
        "rows read twice and written twice, half of that in bfloat16",
    )
    logits = HIT.lengths[-1] * K * 4 / 1e6
    yield Work(
        *("sample_codes", "last scale, B=1, guided, float32", 1, 2 * logits, 0.0, 0.0),
        "two branches of logits, read once",
    )
    yield from _degradations()
    layer = 12 * width * width
    yield Work(
        *("a sample of HIT-d16", "B=1, greedy, bfloat16, in a graph"),
        *(len(HIT.scales) * (HIT.depth * 9 + 8), HIT.depth * layer * 2 * len(HIT.scales) / 1e6),
        *(HIT.depth * (2 * layer * rows + HIT.heads * HIT.pairs * 4 * HIT.D) / 1e9, 0.0),
        "9 kernels a block and scale, weights read at each scale",
    )


def table() -> str:
    """Markdown: times in milliseconds, and what each comes from."""
    names = [f"{CHIPS[target].name} ({target})" for target in SHOWN]
    head = ["op", "case", "launches", "MB", "GFLOP in 16 bits", "10⁹ instructions of lanes", *names]
    lines = [head, ["---"] * len(head)]
    for work in works():
        numbers = [f"{n:.3g}" for n in (work.megabytes, work.products, work.lanes)]
        times = [f"{work.milliseconds(target):.3g}" for target in SHOWN]
        lines.append([work.op, f"{work.case}: {work.formula}", str(work.launches), *numbers, *times])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def memory_table() -> str:
    """Markdown: GiB of a sampler in bfloat16 by preset and batch, by arithmetic."""
    head = [
        "preset",
        "weights",
        *(f"cache, B={B}{guided}" for B in (1, 8, 32) for guided in ("", ", guided")),
    ]
    lines = [head, ["---"] * len(head)]
    for name in ("hit-d16", "hit-tiny"):
        config, shape = PRESETS[name], MODELS[name]
        with torch.device("meta"):
            weights = sum(p.numel() for p in HitVar(config).parameters()) * 2 / 2**30
        # Keys and values of each layer, for the prefix and all scales.
        branch = 2 * shape.depth * sum(shape.blocks) * shape.width * 2 / 2**30
        caches = [f"{branch * B * branches:.3g}" for B in (1, 8, 32) for branches in (1, 2)]
        lines.append([f"`{name}`", f"{weights:.3g}", *caches])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(table())
    print(memory_table(), end="")
