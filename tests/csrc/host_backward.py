"""The kernels of `residual_decode_backward` on the CPU, behind what the launcher calls."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from tests.csrc.host_kernel import Arrays, start

SOURCE = Path("tests/csrc/residual_decode_backward_host.cpp")


@dataclass(frozen=True)
class Problem:
    """Arguments of the private op `_residual_decode_backward_cuda`, and how the work is cut:
    threads of a block, and about how many blocks share the tiles."""

    grad: Tensor
    grad_per_scale: Tensor
    indices: Tensor
    codes: Tensor
    order: Tensor
    codebook: Tensor
    phi_weight: Tensor
    scales: Sequence[int]
    phi_index: Sequence[int]
    phi_ratio: float
    threads: int = 256
    blocks: int = 768

    def write(self, path: Path) -> None:
        (B, C, H, W), (K, _), P = self.grad.shape, self.codebook.shape, self.phi_weight.shape[0]
        header = [C, B, H, W, K, P, len(self.phi_index), len(self.grad_per_scale) > 0]
        header += [self.threads, self.blocks]
        sizes = zip(self.scales[::2], self.scales[1::2], self.phi_index, strict=True)
        tensors = (self.grad, self.grad_per_scale, self.indices, self.codes, self.order, self.codebook)
        with path.open("wb") as file:
            file.write(np.array(header, dtype=np.int32).tobytes())
            file.write(np.array(self.phi_ratio, dtype=np.float32).tobytes())
            file.write(np.array(list(sizes), dtype=np.int32).tobytes())
            for tensor in (*tensors, self.phi_weight):
                assert tensor.is_contiguous()
                file.write(tensor.numpy().tobytes())


@dataclass(frozen=True)
class Result:
    """Blocks that share the tiles of all scales, tiles of each, bytes of shared memory; and the gradients."""

    blocks: int
    work: int
    shared: int
    gradients: tuple[Tensor, Tensor, Tensor]


def execute(program: Path, problem: Problem, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the program, whatever comes of it."""
    problem.write(folder / "problem")
    return start(program, folder)


def run(program: Path, problem: Problem, folder: Path) -> Result:
    """Runs the program and reads what it leaves."""
    done = execute(program, problem, folder)
    assert done.returncode == 0, done.stderr
    arrays, (K, C), P = Arrays(folder / "result"), problem.codebook.shape, problem.phi_weight.shape[0]
    blocks, work, shared = arrays.take(np.int32, 3).tolist()
    shapes = (K, C), (P, C, C, 3, 3), (P, C)
    codebook, weight, bias = (arrays.take(np.float32, *shape) for shape in shapes)
    arrays.end()
    return Result(blocks, work, shared, (codebook, weight, bias))
