"""The kernels of `group_norm_silu`, compiled for chips that are not here: what they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hitsr_fast.ops import group_norm_silu_triton as triton
from tests.kernels.aot import TARGETS, Kernel, check_resources, compile_launches

KERNELS = {"_group_norm_moments_kernel", "_group_norm_join_kernel", "_group_norm_apply_kernel"}
FORMATS = [torch.contiguous_format, torch.channels_last]


def compiled(
    folder: Path,
    target: str,
    shape: tuple[int, int, int, int],
    groups: int,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> dict[str, Kernel]:
    x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)
    row = torch.zeros(shape[1], dtype=dtype)

    def launch() -> None:
        triton.group_norm_silu_triton(x, row, row, groups, 1e-6)

    return compile_launches(TARGETS[target], launch, folder)


def check(kernels: dict[str, Kernel], target: str) -> None:
    assert set(kernels) == KERNELS
    for kernel in kernels.values():
        check_resources(kernel, target)


@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("target", TARGETS)
def test_as_shipped(target: str, layout: torch.memory_format, tmp_path: Path) -> None:
    check(compiled(tmp_path, target, (1, 160, 64, 64), 32, torch.bfloat16, layout), target)


@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_loads_and_stores_are_wide(target: str, layout: torch.memory_format, tmp_path: Path) -> None:
    """Eight 16-bit values of the map at a time."""
    kernels = compiled(tmp_path, target, (1, 160, 64, 64), 32, torch.bfloat16, layout)
    loads = [text for text in kernels["_group_norm_moments_kernel"].instructions() if "LDG" in text]
    assert loads and all(".128" in text for text in loads)
    stores = [text for text in kernels["_group_norm_apply_kernel"].instructions() if "STG" in text]
    assert stores and all(".128" in text for text in stores)


def test_sizes_of_one(tmp_path: Path) -> None:
    """Triton makes constants of integers that are 1, which the interpreter does not."""
    check(compiled(tmp_path, "sm_90", (1, 1, 1, 1), 1, torch.float32, FORMATS[0]), "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (40, 5), (96, 32), (640, 32), (4096, 1)])
@pytest.mark.parametrize("target", TARGETS)
def test_other_widths(
    target: str, channels: int, groups: int, layout: torch.memory_format, tmp_path: Path
) -> None:
    for dtype in (torch.float32, torch.float16):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        check(compiled(folder, target, (2, channels, 9, 11), groups, dtype, layout), target)
