"""The kernel of `sample_codes`, compiled for chips that are not here: what it takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hitsr_fast.ops import sample_codes_triton
from tests.kernels.aot import TARGETS, Kernel, check_resources, compile_launches

# Products and sums of float32 in one step, which the definition has none of.
FUSED = re.compile(r"\b(FFMA|V_FMA_F32|V_FMAC_F32|V_PK_FMA_F32)")


def compiled(
    folder: Path,
    target: str,
    *,
    shape: tuple[int, int] = (1024, 4096),
    dtype: torch.dtype = torch.float32,
    greedy: bool = False,
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
) -> Kernel:
    logits = torch.zeros(shape, dtype=dtype)
    uncond = logits if guidance > 0 else None
    state = None if greedy else torch.zeros(2, dtype=torch.int64)

    def launch() -> None:
        sample_codes_triton.sample_codes_triton(logits, uncond, state, guidance, top_k, top_p, 0.9)

    (kernel,) = compile_launches(TARGETS[target], launch, folder).values()
    return kernel


def fused(kernel: Kernel) -> list[str]:
    return [line for line in kernel.instructions() if FUSED.search(line)]


def check(kernel: Kernel, target: str) -> None:
    check_resources(kernel, target)
    assert not fused(kernel)


@pytest.mark.parametrize("target", TARGETS)
def test_as_shipped(target: str, tmp_path: Path) -> None:
    check(compiled(tmp_path, target), target)


@pytest.mark.parametrize("greedy", [False, True])
def test_sizes_of_one(greedy: bool, tmp_path: Path) -> None:
    """Triton makes constants of integers that are 1, which the interpreter does not."""
    check(compiled(tmp_path, "sm_90", shape=(1, 1), greedy=greedy, top_k=1), "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("codes", [7, 64, 1000, 8192, 16384])
@pytest.mark.parametrize("target", TARGETS)
def test_other_sizes(target: str, codes: int, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        check(compiled(folder, target, shape=(1024, codes), dtype=dtype, top_k=codes // 2), target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_other_options(target: str, tmp_path: Path) -> None:
    for place, options in enumerate(
        [{"greedy": True}, {"guidance": 0.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_k": 0, "top_p": 0.0}]
    ):
        folder = tmp_path / str(place)
        folder.mkdir()
        check(compiled(folder, target, **options), target)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942"])
def test_a_fused_step_is_seen(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_codes_triton, "_OPTIONS", {"num_stages": 1, "enable_fp_fusion": True})
    assert fused(compiled(tmp_path, target))
