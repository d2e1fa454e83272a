"""What Triton kernels take on chips that are not here: compiled ahead of time, counted, and predicted."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks._harness import AuditPlan, C
from tests.kernels.aot import TARGETS, Kernel, compile_launches

_RESERVED_SHARED = 1024  # bytes that CUDA keeps for itself in each program, compute capability 8.0 and later


@dataclass(frozen=True)
class Chip:
    """One GPU of a target, from its maker's data sheet.

    Attributes:
        name: of the GPU.
        units: streaming multiprocessors or compute units.
        lanes: threads for which a unit can start an instruction in each clock.
        gigahertz: boost clock.
        teraflops: of float16 products with float32 sums, dense.
        registers: 32-bit, of a unit; split among four schedulers.
        shared_kib: of a unit.
        warps: that a unit can hold.
        exponentials: that a unit starts in each clock.
    """

    name: str
    units: int
    lanes: int
    gigahertz: float
    teraflops: float
    registers: int
    shared_kib: int
    warps: int
    exponentials: int = 16


CHIPS: Mapping[str, Chip] = {
    "sm_80": Chip("A100 SXM", 108, 128, 1.41, 312, 65536, 164, 64),
    "sm_86": Chip("RTX 3090", 82, 128, 1.70, 71, 65536, 100, 48),
    "sm_89": Chip("RTX 4090", 128, 128, 2.52, 165, 65536, 100, 48),
    "sm_90": Chip("H100 SXM", 132, 128, 1.83, 989, 65536, 228, 64),
    "sm_100": Chip("B200", 148, 128, 1.85, 2250, 65536, 228, 64),
    "sm_103": Chip("B300", 148, 128, 1.92, 2250, 65536, 228, 64, exponentials=32),
    "sm_120": Chip("RTX 5090", 170, 128, 2.41, 210, 65536, 100, 48),
    "gfx942": Chip("MI300X", 304, 64, 2.1, 1307, 131072, 64, 32),
    "gfx950": Chip("MI355X", 256, 64, 2.4, 2517, 131072, 160, 32),
}


@dataclass(frozen=True)
class Finding:
    """One kernel on one target; None for a kernel without scores, or where no loop is found in its code.

    Attributes:
        target: of the compiler.
        chip: for which the predictions hold.
        kernel: its name.
        registers: of a thread.
        shared: bytes of a program.
        spilled: bytes of stack and local memory.
        per_score: instructions of the loop, counted once for each thread, over its scores.
        occupancy: predicted: warps that a unit holds, of those that it could.
        floor_ms: predicted: the longest of the times of the products at the chip's peak, of the exponentials,
            and of the start of the loop's instructions. Memory, launches and what stands around the loop come
            on top.
    """

    target: str
    chip: str
    kernel: str
    registers: int
    shared: int
    spilled: int
    per_score: float | None
    occupancy: float
    floor_ms: float | None


def audit(plan: AuditPlan[C], case: C, targets: Sequence[str]) -> Iterator[Finding]:
    """Compile an op's kernels for targets (keys of `CHIPS`) as a case would launch them, and count."""
    for target in targets:
        with tempfile.TemporaryDirectory() as folder:
            kernels = compile_launches(TARGETS[target], lambda: plan.launch(case), Path(folder))
            for kernel in kernels.values():
                yield _finding(plan, case, target, kernel, TARGETS[target].warp_size)


def occupancy(chip: Chip, *, registers: int, shared: int, threads: int, warp: int) -> float:
    """Warps that fit on a unit at once, over those that it can hold."""
    schedulers = 4
    rounded = -(-registers // 8) * 8 * warp
    by_registers = chip.registers // schedulers // rounded * schedulers
    warps = threads // warp
    programs = min(by_registers, chip.warps) // warps
    reserved = _RESERVED_SHARED if warp == 32 else 0
    if shared + reserved:
        programs = min(programs, chip.shared_kib * 1024 // (shared + reserved))
    return programs * warps / chip.warps


def _finding(plan: AuditPlan[C], case: C, target: str, kernel: Kernel, warp: int) -> Finding:
    chip = CHIPS[target]
    used = kernel.resources()
    per_score = floor_ms = None
    loop, found = plan.loops.get(kernel.name), kernel.product_loops()
    if loop is not None and found:
        per_score = len(found[0]) * kernel.threads / loop.per_turn(case, target)
        clocks = chip.units * chip.gigahertz * 1e9
        issue = loop.scores(case) * per_score / (clocks * chip.lanes)
        exponentials = loop.scores(case) * loop.exponentials / (clocks * chip.exponentials)
        products = loop.tensor_flops(case) / (chip.teraflops * 1e12)
        floor_ms = max(issue, exponentials, products) * 1e3
    return Finding(
        target=target,
        chip=chip.name,
        kernel=kernel.name,
        registers=used.registers,
        shared=used.shared,
        spilled=used.spilled,
        per_score=per_score,
        occupancy=occupancy(
            chip, registers=used.registers, shared=used.shared, threads=kernel.threads, warp=warp
        ),
        floor_ms=floor_ms,
    )
