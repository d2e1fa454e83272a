"""The kernel of `attention_prologue`, compiled for chips that are not here: what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hitsr_fast.ops import attention_prologue_triton as triton
from tests.kernels.aot import TARGETS, Kernel, check_resources, compile_launches


def compiled(
    folder: Path,
    target: str,
    shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    cached: torch.dtype = torch.bfloat16,
    rotary: bool = True,
    start: int = 16,
) -> list[Kernel]:
    """One launch for (B, L, NH, D), taken apart."""
    B, L, NH, D = shape
    caches = torch.zeros(2, B, start + L, NH, D, dtype=cached)
    table = torch.zeros(L, D // 2, 2) if rotary else None
    qkv, bias, scale = torch.zeros(B, L, 3 * NH * D, dtype=dtype), torch.zeros(3 * NH * D), torch.zeros(NH)

    def launch() -> None:
        triton.attention_prologue_triton(qkv, caches[0], caches[1], start, bias, scale, table)

    return list(compile_launches(TARGETS[target], launch, folder).values())


def check(kernels: list[Kernel], target: str) -> None:
    assert [kernel.name for kernel in kernels] == ["_attention_prologue_kernel"]
    check_resources(kernels[0], target)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_as_shipped(target: str, rotary: bool, tmp_path: Path) -> None:
    check(compiled(tmp_path, target, (2, 1024, 16, 64), rotary=rotary), target)


def test_sizes_of_one(tmp_path: Path) -> None:
    """Triton makes constants of integers that are 1, which the interpreter does not."""
    check(compiled(tmp_path, "sm_90", (1, 1, 1, 2), start=1), "sm_90")


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_loads_and_stores_are_wide(target: str, tmp_path: Path) -> None:
    """Eight 16-bit values at a time: the three parts of qkv come, and q and two rows of the caches go."""
    (kernel,) = compiled(tmp_path, target, (2, 1024, 16, 64))
    wide = [text for text in kernel.instructions() if ".128" in text]
    stores = [text for text in wide if "STG" in text]
    narrow = [text for text in kernel.instructions() if "STG" in text and ".128" not in text]
    assert stores and not narrow


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 6), (30, 64), (20, 72), (8, 128), (2, 1024)])
@pytest.mark.parametrize("target", TARGETS)
def test_other_sizes(target: str, heads: int, head_dim: int, tmp_path: Path) -> None:
    for dtype, cached in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16)):
        folder = tmp_path / f"{dtype}-{cached}"
        folder.mkdir()
        check(compiled(folder, target, (2, 100, heads, head_dim), dtype=dtype, cached=cached), target)
