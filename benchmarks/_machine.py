"""What a measurement rests on: threads, clocks, memory, and a record of the machine."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
Timer = Callable[[Call], float]

_ROOT = Path(__file__).resolve().parents[1]
_INSTRUCTION_SETS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16"),
    *("asimd", "sve"),
)
_CANARY_SIZE = 256
_SMALL_GEMM = 256
_L2_FLUSH_BYTES = 256 * 2**20  # more than the L2 of any GPU


class MachineError(RuntimeError):
    """The machine is not in the state that a measurement needs."""


@dataclass(frozen=True)
class Conditions:
    """Under which a run was made; its fields are columns of the results.

    Attributes:
        device: "cpu", or the name of the GPU.
        cpu_model: as the system names it.
        instruction_sets: of the CPU, those that matter for speed.
        torch: its version.
        threads: of every library in the run.
        load: average number of busy threads in the minute before the run; it belongs at 0.
        date: of the start of the run, UTC.
        commit: of the checkout, with "+changes" if files differ from it.
    """

    device: str
    cpu_model: str
    instruction_sets: str
    torch: str
    threads: int
    load: float
    date: str
    commit: str


def conditions(device: torch.device, threads: int) -> Conditions:
    """Those of a run that starts now."""
    cpuinfo = _cpuinfo()
    flags = cpuinfo.get("flags", cpuinfo.get("Features", "")).split()
    return Conditions(
        device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        cpu_model=_cpu_model(cpuinfo),
        instruction_sets=" ".join(name for name in _INSTRUCTION_SETS if name in flags),
        torch=torch.__version__,
        threads=threads,
        load=round(os.getloadavg()[0], 2),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        commit=_commit(),
    )


def require_threads(threads: int) -> None:
    """Make sure that the libraries of this process were loaded for that many threads.

    Raises:
        MachineError: `OMP_NUM_THREADS`, which some read only as they are loaded, is another number, or it is
            below 1.
    """
    if threads < 1:
        raise MachineError(f"--threads: expected at least 1, found {threads}")
    found = os.environ.get("OMP_NUM_THREADS")
    if found != str(threads):
        raise MachineError(
            f"OMP_NUM_THREADS: expected {threads}, as many threads as asked for, found {found or 'nothing'}"
        )


def device(name: str) -> torch.device:
    """The CPU, the GPU, or for "auto" a GPU where there is one.

    Raises:
        MachineError: there is no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise MachineError("--device: expected cpu, as there is no GPU, found cuda")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def synchronized(call: Call, device: torch.device) -> Call:
    """The call, and the wait for what it leaves to a GPU."""
    if device.type == "cpu":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize(device)

    return run


def timer(device: torch.device) -> Timer:
    """A function that runs a call once and gives its milliseconds.

    On a GPU they lie between two events, with the L2 cache flushed before, as in `triton.testing.do_bench`.
    """
    if device.type == "cpu":
        return _cpu_milliseconds
    flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device=device)

    def milliseconds(call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        taken: float = start.elapsed_time(end)
        return taken

    return milliseconds


def _cpu_milliseconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def gemm_rate(device: torch.device, size: int) -> float:
    """FLOP per second of the best of PyTorch's float32 and bfloat16 products of square matrices."""
    clock = timer(device)

    def rate(dtype: torch.dtype, size: int, repeats: int) -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        multiply = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
        return 2 * size**3 / min(clock(multiply) for _ in range(repeats)) * 1e3

    best = rate(torch.float32, size, 10)
    # A CPU that does not multiply bfloat16 takes most of a minute for a large product.
    if device.type == "cuda" or rate(torch.bfloat16, min(size, _SMALL_GEMM), 3) > best / 4:
        best = max(best, rate(torch.bfloat16, size, 10))
    return best


def canary(device: torch.device) -> Call:
    """A small fixed product: timed beside a provider, it takes longer where others use the machine."""
    a, b = (torch.ones(_CANARY_SIZE, _CANARY_SIZE, device=device) for _ in range(2))
    return functools.partial(torch.mm, a, b, out=torch.empty_like(a))


def peak_extra_bytes(call: Call, device: torch.device) -> int | None:
    """Most memory that a call holds beyond what the process held before it; None where that cannot be seen.

    On the CPU the system is asked, so allocations of every library count. What a library keeps from one call
    to the next was there before and does not count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # or the call would live on memory that was freed but never given back
        libc.malloc_trim(0)
    reset.write_text("5")
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise MachineError(f"/proc/self/status: expected a line {field}, found none")


def _cpuinfo() -> dict[str, str]:
    """Of the first processor; empty where the system has no such file."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    lines = path.read_text().partition("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _cpu_model(cpuinfo: dict[str, str]) -> str:
    name = cpuinfo.get("model name") or platform.processor() or platform.machine()
    if "cpu family" not in cpuinfo:
        return name
    return f"{name} (family {cpuinfo['cpu family']}, model {cpuinfo['model']})"


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=_ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    if not (_ROOT / ".git").exists():
        return ""
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changes else "")
