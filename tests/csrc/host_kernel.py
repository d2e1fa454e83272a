"""The CUDA backend's kernel, compiled for the CPU and run there in a process of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hitsr_fast.ops import nearest_code_triton as packing
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


def build(folder: Path, *options: str, root: Path = ROOT) -> Path:
    """The executable of a checkout's source, in a folder."""
    program = folder / "residual_quantize_host"
    command = [*COMPILER, *FLAGS, *options, str(root / SOURCE), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


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
    parts = tuple(problem.parts) or packing.prepare(problem.codebook, "l2")[1]
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
    data, place = path.read_bytes(), 0

    def take(dtype: type, *shape: int) -> Tensor:
        nonlocal place
        array = np.frombuffer(data, dtype, int(np.prod(shape)), place)
        place += array.nbytes
        return torch.from_numpy(array.reshape(shape).copy())

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
    assert place == len(data)
    return result


def execute(program: Path, problem: Problem, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the program, whatever comes of it."""
    write(problem, folder / "problem")
    # Sanitizers end a process with a code of their own once they have something to say.
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:exitcode=66",
        "UBSAN_OPTIONS": "halt_on_error=1:exitcode=66:print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
    }
    command = [str(program), str(folder / "problem"), str(folder / "result")]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def run(program: Path, problem: Problem, folder: Path) -> Result:
    """Runs the program and reads what it leaves."""
    done = execute(program, problem, folder)
    assert done.returncode == 0, done.stderr
    return read(problem, folder / "result")
