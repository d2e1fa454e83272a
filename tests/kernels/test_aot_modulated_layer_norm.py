"""The kernels of `modulated_layer_norm`, compiled for chips that are not here: what they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hitsr_fast.ops import modulated_layer_norm_triton as triton
from tests.kernels.aot import TARGETS, Kernel, check_resources, compile_launches

KERNELS = {
    "_modulated_layer_norm_fwd_kernel",
    "_modulated_layer_norm_bwd_kernel",
    "_gated_residual_fwd_kernel",
    "_gated_residual_bwd_kernel",
}


def compiled(folder: Path, target: str, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Kernel]:
    B, L, C = shape
    x, row, mean = torch.zeros(shape, dtype=dtype), torch.zeros(B, C, dtype=dtype), torch.zeros(B, L)

    def launch() -> None:
        triton.modulated_layer_norm_triton(x, row, row, 1e-6, x.dtype)
        triton.modulated_layer_norm_backward_triton(x, x, row, mean, mean)
        triton.gated_residual_triton(x, x, row)
        triton.gated_residual_backward_triton(x, x, row)

    return compile_launches(TARGETS[target], launch, folder)


def check(kernels: dict[str, Kernel], target: str) -> None:
    assert set(kernels) == KERNELS
    for kernel in kernels.values():
        check_resources(kernel, target)


@pytest.mark.parametrize("target", TARGETS)
def test_as_shipped(target: str, tmp_path: Path) -> None:
    check(compiled(tmp_path, target, (4, 1024, 1024), torch.bfloat16), target)


def test_sizes_of_one(tmp_path: Path) -> None:
    """Triton makes constants of integers that are 1, which the interpreter does not."""
    check(compiled(tmp_path, "sm_90", (1, 1, 1), torch.float32), "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("channels", [5, 256, 1536, 1920, 4096, 8192])
@pytest.mark.parametrize("target", TARGETS)
def test_other_widths(target: str, channels: int, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        check(compiled(folder, target, (4, 100, channels), dtype), target)
