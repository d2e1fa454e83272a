"""What a launcher would run on a GPU, compiled ahead of time on a machine that has none, and taken apart.

The launcher itself is called, with a driver that only names a chip: signatures, constants and options are
those of a real launch.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_103": GPUTarget("cuda", 103, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# One of each kind: what the ordinary run compiles for; the slow one compiles for all.
KINDS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
AMD = tuple(name for name, target in TARGETS.items() if target.backend == "hip")

# Bytes that one program may have.
SHARED = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_103": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}

# In upper case: NVIDIA's warp, warp-group and fifth-generation products, and AMD's.
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|V_MFMA)")

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Resources:
    """What a kernel takes. `spilled` counts everything that went to memory for want of registers.

    Attributes:
        registers: of a thread.
        shared: bytes of a program.
        spilled: bytes of stack and local memory; on AMD registers and bytes.
        scalars: of those, AMD's scalar registers, which go to lanes of vector registers.
    """

    registers: int
    shared: int
    spilled: int
    scalars: int = 0


class Kernel:
    """A compiled kernel."""

    def __init__(self, compiled: Any, target: GPUTarget, folder: Path) -> None:
        self.name: str = compiled.metadata.name
        self.threads: int = compiled.metadata.num_warps * target.warp_size
        self._shared: int = compiled.metadata.shared
        self._amd = target.backend == "hip"
        if self._amd:
            self.assembly: str = compiled.asm["amdgcn"]
        else:
            self._cubin = folder / f"{self.name}.cubin"
            self._cubin.write_bytes(compiled.asm["cubin"])
            self.assembly = self._tool("nvdisasm", "-c")

    def _tool(self, name: str, option: str) -> str:
        command = [str(_TOOLS / name), option, str(self._cubin)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def resources(self) -> Resources:
        scalars = 0
        if self._amd:
            registers, *spilled = (
                int(re.findall(rf"\.{field}:\s+(\d+)", self.assembly)[0])
                for field in (
                    "vgpr_count",
                    "vgpr_spill_count",
                    "sgpr_spill_count",
                    "private_segment_fixed_size",
                )
            )
            scalars = spilled[1]
        else:
            usage = self._tool("cuobjdump", "-res-usage")
            registers, *spilled = (
                int(re.findall(rf"\b{field}:(\d+)", usage)[0]) for field in ("REG", "STACK", "LOCAL")
            )
        return Resources(registers, self._shared, sum(spilled), scalars)

    def instructions(self) -> list[str]:
        """In upper case, in order of address."""
        return [instruction for instruction, _ in self._lines()]

    def loops(self) -> list[list[str]]:
        """The instructions of every loop: from the target of a jump back to the jump, the shortest first."""
        instructions = self.instructions()
        return [instructions[first:end] for first, end in self._spans()]

    def product_loop(self) -> list[str]:
        """The innermost loop that runs on the tensor cores."""
        return next(loop for loop in self.loops() if any(map(TENSOR_CORE.search, loop)))

    def product_loops(self) -> list[list[str]]:
        """The innermost loops that run on the tensor cores, by address; no two share an instruction."""
        instructions = self.instructions()
        found: list[tuple[int, int]] = []
        for first, end in self._spans():
            apart = all(end <= other_first or other_end <= first for other_first, other_end in found)
            if apart and any(map(TENSOR_CORE.search, instructions[first:end])):
                found.append((first, end))
        return [instructions[first:end] for first, end in sorted(found)]

    def _spans(self) -> list[tuple[int, int]]:
        """First and end of every loop, the shortest first."""
        lines = list(self._lines())
        place = {label: i for i, (_, labels) in enumerate(lines) for label in labels}
        found = []
        for i, (instruction, _) in enumerate(lines):
            jump = re.search(r"BRA\w*[ .].*?(\.L\w+)", instruction)
            start = place.get(jump[1], i + 1) if jump else i + 1
            if start <= i:
                found.append((start, i + 1))
        return sorted(found, key=lambda span: span[1] - span[0])

    def _lines(self) -> Iterator[tuple[str, list[str]]]:
        """Each instruction with the labels that stand before it."""
        labels: list[str] = []
        for line in self.assembly.splitlines():
            label = re.match(r"\s*(\.L\w+):", line)
            if label:
                labels.append(label[1].upper())
                continue
            if self._amd:
                text = re.match(r"\s+([a-z]+_[^;]*)", line)
            else:
                text = re.match(r"\s*/\*[0-9a-f]+\*/\s+([^;]*)", line)
            if text:
                yield text[1].strip().upper(), labels
                labels = []


class _NamedChip:
    """A driver that knows a chip's name and has no chip; Triton remembers what it compiled by the device."""

    def __init__(self, target: GPUTarget, device: object = None) -> None:
        self._target, self._device = target, device or target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> object:
        return self._device

    def get_current_stream(self, device: object) -> int:
        return 0


def check_resources(kernel: Kernel, target: str, scalar_spills: bool = False) -> None:
    """Nothing spills, or AMD's scalar registers alone, and the target has a program's shared memory."""
    resources = kernel.resources()
    assert resources.spilled == (resources.scalars if scalar_spills else 0), (kernel.name, resources)
    assert resources.shared <= SHARED[target], (kernel.name, resources)


def compile_launches(target: GPUTarget, launch: Callable[[], object], folder: Path) -> dict[str, Kernel]:
    """By name, the kernels that `launch()` starts, compiled for a chip and not started.

    Args:
        target: the chip.
        launch: calls a launcher with tensors of the CPU; it must not need the kernels' results.
        folder: empty, for the compiler's cache and the cubins.
    """
    kernels: dict[str, Kernel] = {}
    with pytest.MonkeyPatch.context() as patch, triton.knobs.cache.scope(), _driver(_NamedChip(target)):
        triton.knobs.cache.dir = str(folder / "cache")
        run = JITFunction.run

        def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
            kernel = Kernel(compiled, target, folder)
            kernels[kernel.name] = kernel

        patch.setattr(JITFunction, "run", compile_only)
        launch()
    return kernels


def count_compilations(target: GPUTarget, launch: Callable[[], object]) -> Counter[str]:
    """How often each kernel that `launch()` starts would be compiled for a chip; nothing is compiled or run.

    That is, how many kinds of its arguments Triton tells apart: by dtypes, constants, and whether integers
    are 1, and they and pointers multiples of 16.
    """
    kinds: set[tuple[str, str]] = set()

    def note(*, key: str, fn: Any, **_: object) -> bool:
        kinds.add((fn.name, key))
        return True  # so Triton goes no further

    with triton.knobs.runtime.scope(), _driver(_NamedChip(target, device=object())):
        triton.knobs.runtime.jit_cache_hook = note
        launch()
    return Counter(name for name, _ in kinds)


@contextmanager
def _driver(named: _NamedChip) -> Iterator[None]:
    before = driver._active
    driver.set_active(named)  # type: ignore[arg-type]
    try:
        yield
    finally:
        driver._active = before
