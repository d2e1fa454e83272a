"""The CUDA backend's kernels, compiled for the CPU and run there in a process of their own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hitsr_fast.ops import packed_codebook as packing
from hitsr_fast.ops.residual_quantize_cuda import pack_phi

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path("tests/csrc/residual_quantize_host.cpp")
# Shared memory of a block holds one type after another: the compiler is not to tell them apart.
FLAGS = ("-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-pthread")
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler ({COMPILER[0]})"
)
SHARED = {"sm_80": 166912, "sm_90": 232448}  # bytes that a block may have
# Ways to build: for speed, and with the sanitizers of memory and arithmetic or of threads.
QUICK = ("-O2", "-march=native")
MEMORY = ("-O1", "-g", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREADS = ("-O1", "-g", "-march=native", "-fsanitize=thread", "-DTEAM=Threads")
RACED, REPORTED = "data race", 66
BARRIER = re.compile(r"block\.(sync|sync_warp|sync_cluster|copy_wait)\(\);")


def build(folder: Path, *options: str, root: Path = ROOT, source: Path = SOURCE) -> Path:
    """The executable of a checkout's source, in a folder."""
    program = folder / source.stem
    command = [*COMPILER, *FLAGS, *options, str(root / source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def start(program: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program on the file `problem` in a folder, to leave `result`, whatever comes of it."""
    # Sanitizers end a process with a code of their own once they have something to say.
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:exitcode=66",
        "UBSAN_OPTIONS": "halt_on_error=1:exitcode=66:print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
    }
    command = [str(program), str(folder / "problem"), str(folder / "result")]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def barriers(op: str) -> Iterator[tuple[Path, int]]:
    """Each call of an op's kernels that orders threads: the file, and which one in it."""
    for path in sorted((ROOT / "csrc" / "cuda" / op).glob("*.h")):
        for number, _ in enumerate(BARRIER.finditer(path.read_text())):
            yield path.relative_to(ROOT), number


def break_copy(folder: Path, path: Path, number: int) -> None:
    """The sources in a folder, with one of those calls left out."""
    for sources in ("csrc", "tests/csrc"):
        shutil.copytree(ROOT / sources, folder / sources)
    text = (folder / path).read_text()
    call = list(BARRIER.finditer(text))[number]
    (folder / path).write_text(text[: call.start()] + text[call.end() :])


class Arrays:
    """Those that a program has left, in their order."""

    def __init__(self, path: Path) -> None:
        self._data, self._place = path.read_bytes(), 0

    def take(self, dtype: type, *shape: int) -> Tensor:
        array = np.frombuffer(self._data, dtype, int(np.prod(shape)), self._place)
        self._place += array.nbytes
        return torch.from_numpy(array.reshape(shape).copy())

    def end(self) -> None:
        assert self._place == len(self._data)


@dataclass(frozen=True)
class Problem:
    """Arguments of `residual_quantize`, and of the launch. z None: decode `replay`.

    phi_weight may be packed already; no parts: the codebook is packed here.
    """

    z: Tensor | None
    codebook: Tensor
    phi_weight: Tensor
    phi_bias: Tensor
    scales: Sequence[tuple[int, int]]
    phi_index: Sequence[int]
    size: tuple[int, int]
    batch: int = 1
    phi_ratio: float = 0.5
    replay: Tensor | None = None
    inputs: bool = False
    per_scale: bool = False
    threads: int = 256
    max_ranks: int = 1
    strip: int = 0
    limit: int = SHARED["sm_80"]
    parts: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Result:
    """What the kernel gives; its plan; the rows (B, T, C) that it searched, and where (B, T) in full."""

    ranks: int
    strip: int
    shared: int
    indices: Tensor
    reconstruction: Tensor
    inputs: Tensor
    reconstructions: Tensor
    rows: Tensor
    full_scans: Tensor


def write(problem: Problem, path: Path) -> None:
    (K, C), (H, W) = problem.codebook.shape, problem.size
    parts = tuple(problem.parts) or packing.pack_eager(problem.codebook, "l2")[1]
    phi, replay = problem.phi_weight, problem.replay
    header = [
        *(C, problem.batch, H, W, K, parts[1].shape[1] // 128, phi.shape[0]),
        *(len(problem.scales), 0 if replay is None else replay.shape[1], problem.z is None),
        *(
            problem.inputs,
            problem.per_scale,
            problem.threads,
            problem.max_ranks,
            problem.strip,
            problem.limit,
        ),
    ]
    scales = [(h, w, phi) for (h, w), phi in zip(problem.scales, problem.phi_index, strict=True)]
    packed = phi if phi.shape[-1] == 4 else pack_phi(phi)
    tensors = [problem.z, problem.codebook, *parts, packed, problem.phi_bias, replay]
    with path.open("wb") as file:
        file.write(np.array(header, dtype=np.int32).tobytes())
        file.write(np.array(problem.phi_ratio, dtype=np.float32).tobytes())
        file.write(np.array(scales, dtype=np.int32).tobytes())
        for tensor in tensors:
            if tensor is not None:
                file.write(tensor.contiguous().numpy().tobytes())


def read(problem: Problem, path: Path) -> Result:
    C, (H, W), B, S = problem.codebook.shape[1], problem.size, problem.batch, len(problem.scales)
    T = sum(h * w for h, w in problem.scales)
    first = problem.scales[0][0] * problem.scales[0][1]
    arrays = Arrays(path)
    take = arrays.take
    plan = [int(value) for value in take(np.int32, 3)]
    result = Result(
        *plan,
        take(np.int64, B, T),
        take(np.float32, B, C, H, W),
        take(np.float32, B, T - first if problem.inputs else 0, C),
        take(np.float32, S if problem.per_scale else 0, B, C, H, W),
        take(np.float32, B, T, C),
        take(np.uint8, B, T).bool(),
    )
    arrays.end()
    return result


def execute(program: Path, problem: Problem, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the program, whatever comes of it."""
    write(problem, folder / "problem")
    return start(program, folder)


def run(program: Path, problem: Problem, folder: Path) -> Result:
    """Runs the program and reads what it leaves."""
    done = execute(program, problem, folder)
    assert done.returncode == 0, done.stderr
    return read(problem, folder / "result")
