"""The kernels of `nearest_code`, compiled for chips that are not here: what they take, where they run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hitsr_fast.ops import nearest_code_triton
from tests.kernels.aot import TARGETS, TENSOR_CORE, Kernel, check_resources, compile_launches

ROUND, SCREEN = "_nearest_code_round_kernel", "_nearest_code_screen_kernel"
RECHECK = "_nearest_code_recheck_kernel"


# Instructions of a thread in a turn of the screen's loop, over its scores, at K = 4096 and C = 32.
BUDGET = {"sm_90": 3.0, "sm_100": 3.0}


def compiled(
    folder: Path,
    target: str,
    *,
    metric: str = "l2",
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (65536, 32),
    codes: int = 4096,
) -> dict[str, Kernel]:
    x, codebook = torch.zeros(shape, dtype=dtype), torch.zeros(codes, shape[1])
    layout, parts = nearest_code_triton.prepare(codebook, metric)

    def launch() -> None:
        nearest_code_triton.nearest_code_triton(x, codebook, list(parts), layout, metric)

    return compile_launches(TARGETS[target], launch, folder)


def check(kernels: dict[str, Kernel], target: str) -> None:
    assert set(kernels) == {ROUND, SCREEN, RECHECK}
    for kernel in kernels.values():
        check_resources(kernel, target)
    assert any(map(TENSOR_CORE.search, kernels[SCREEN].instructions()))
    assert not any(map(TENSOR_CORE.search, kernels[RECHECK].instructions()))
    # The definition multiplies and adds in two steps.
    assert not [line for line in kernels[RECHECK].instructions() if line.startswith(("DFMA", "V_FMA_F64"))]
    assert [line for line in kernels[RECHECK].instructions() if line.startswith(("DADD", "V_ADD_F64"))]


def per_score(kernel: Kernel, channels: int) -> float:
    blocks = nearest_code_triton.screen_constants(channels)
    scores = blocks["BLOCK_N"] * blocks["BLOCK_K"] * blocks["PARTS"]
    return len(kernel.product_loop()) * kernel.threads / scores


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("target", TARGETS)
def test_as_shipped(target: str, metric: str, tmp_path: Path) -> None:
    kernels = compiled(tmp_path, target, metric=metric)
    check(kernels, target)
    assert per_score(kernels[SCREEN], 32) <= BUDGET.get(target, 4.0)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_sizes_of_one(metric: str, tmp_path: Path) -> None:
    """Triton makes constants of integers that are 1, which the interpreter does not."""
    check(compiled(tmp_path, "sm_90", metric=metric, shape=(1, 1), codes=1), "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 8, 16, 33, 64, 100, 128, 256])
@pytest.mark.parametrize("target", TARGETS)
def test_other_widths(target: str, channels: int, tmp_path: Path) -> None:
    for metric in ("l2", "cosine"):
        folder = tmp_path / metric
        folder.mkdir()
        check(compiled(folder, target, metric=metric, shape=(65536, channels)), target)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(65536, 32), (1, 32), (1000, 32), (3, 32, 13, 7)])
@pytest.mark.parametrize("target", TARGETS)
def test_other_inputs(target: str, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    """Triton compiles anew for other dtypes, and for sizes and strides that are 1 or multiples of 16."""
    check(compiled(tmp_path, target, shape=shape, dtype=dtype, codes=1000), target)


def test_a_spill_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile in one part takes more registers than a thread of sm_100 has."""
    blocks = nearest_code_triton.screen_constants(32) | {"BLOCK_K": 128, "PARTS": 1}
    monkeypatch.setattr(nearest_code_triton, "screen_constants", lambda channels: blocks)
    assert compiled(tmp_path, "sm_100")[SCREEN].resources().spilled > 0
