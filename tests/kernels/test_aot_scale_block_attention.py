"""The kernels of `scale_block_attention`, compiled for chips that are not here: what they take and do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import MODELS
from hitsr_fast.ops import scale_block_attention_triton as triton
from tests.kernels.aot import TARGETS, Kernel, check_resources, compile_launches

FORWARD, DKDV, DQ, DELTA = (
    f"_scale_block_attention_{name}_kernel" for name in ("fwd", "dkdv", "dq", "delta")
)
DECODE, COMBINE = "_cached_attention_kernel", "_cached_attention_combine_kernel"
TRAINING = {FORWARD: "forward", DKDV: "dkdv", DQ: "dq"}

# Of HIT-VAR at 512 pixels: the prefix and the first scale, then the other nine.
BLOCKS = MODELS["hit-d16"].blocks

# Instructions of a thread in a turn of the loop over whole tiles, over its scores: bfloat16, D = 64.
BUDGET = {
    "sm_80": {FORWARD: 12.2, DKDV: 16.4, DQ: 10.9},
    "sm_89": {FORWARD: 12.2, DKDV: 16.4, DQ: 11.2},
    "sm_90": {FORWARD: 8.95, DKDV: 10.5, DQ: 8.9},
    "sm_100": {FORWARD: 7.5, DKDV: 9.5, DQ: 10.2},
    "gfx942": {FORWARD: 12.9, DKDV: 36.8, DQ: 14.0},
}

COMPARISON = re.compile(r"\b(ISETP|V_CMP_\w+_I32)")
SELECTION = re.compile(r"\bFSEL\b")
LOOP_CONTROL = 16  # comparisons that a loop needs for itself: more would be those of a mask, one a score


def compiled(
    folder: Path,
    target: str,
    head_dim: int,
    dtype: torch.dtype,
    *,
    blocks: list[int] = BLOCKS,
    heads: int = 16,
    queries: int = 36,
    training: bool = True,
) -> dict[str, Kernel]:
    """All kernels, or those of a cache alone, which see some number of queries; of slices of one tensor."""
    T = sum(blocks)
    q, k, v = torch.zeros(1, T, 3, heads, head_dim, dtype=dtype).unbind(2)
    out, lse = torch.zeros(1, T, heads, head_dim, dtype=dtype), torch.zeros(1, heads, T)

    def launch() -> None:
        if training:
            triton.scale_block_attention_triton(q, k, v, blocks, 0.125)
            triton.scale_block_attention_backward_triton(out, q, k, v, out, lse, blocks, 0.125)
        triton.cached_attention_triton(q[:, :queries], out, out, T, 0.125)

    return compile_launches(TARGETS[target], launch, folder)


def check(kernels: dict[str, Kernel], target: str, dtype: torch.dtype) -> None:
    """Nothing spills; both loops multiply on tensor cores, that over whole tiles without a mask."""
    for kernel in kernels.values():
        check_resources(kernel, target)
    for name in {*TRAINING, DECODE} & set(kernels):
        whole, _ = kernels[name].product_loops()
        assert sum(map(bool, map(COMPARISON.search, whole))) <= LOOP_CONTROL, name
        if target != "gfx942" and dtype != torch.float32:  # there rounding and splitting select, too
            assert not any(map(SELECTION.search, whole)), name
            assert any(map(SELECTION.search, kernels[name].instructions())), name


@pytest.mark.parametrize(
    "target",
    [name if name in ("sm_90", "gfx942") else pytest.param(name, marks=pytest.mark.slow) for name in TARGETS],
)
def test_as_trained(target: str, tmp_path: Path) -> None:
    kernels = compiled(tmp_path, target, 64, torch.bfloat16)
    assert set(kernels) == {*TRAINING, DELTA, DECODE, COMBINE}
    check(kernels, target, torch.bfloat16)
    chip = triton.family(TARGETS[target].backend, TARGETS[target].arch)
    for name, kind in TRAINING.items():
        blocks = triton.constants(kind, torch.bfloat16, 64, chip)
        whole, _ = kernels[name].product_loops()
        per_score = len(whole) * kernels[name].threads / (blocks["BLOCK_M"] * blocks["BLOCK_N"])
        assert per_score <= BUDGET[target][name], (name, per_score)


def test_sizes_of_one(tmp_path: Path) -> None:
    """Triton makes constants of integers that are 1, which the interpreter does not."""
    kernels = compiled(tmp_path, "sm_90", 1, torch.bfloat16, blocks=[1], heads=1, queries=1)
    assert all(kernel.resources().spilled == 0 for kernel in kernels.values())


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", TARGETS)
def test_all(target: str, dtype: torch.dtype, head_dim: int, tmp_path: Path) -> None:
    for queries in (1, 20, 100, 1024):
        folder = tmp_path / str(queries)
        folder.mkdir()
        kernels = compiled(folder, target, head_dim, dtype, queries=queries, training=queries == 1)
        check(kernels, target, dtype)


def test_a_spill_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the keys that the tile of a forward has room for."""
    shipped = triton.constants
    monkeypatch.setattr(triton, "constants", lambda *args: shipped(*args) | {"BLOCK_N": 128})
    q = torch.zeros(1, 4476, 16, 64, dtype=torch.bfloat16)
    kernels = compile_launches(
        TARGETS["sm_90"], lambda: triton.scale_block_attention_triton(q, q, q, BLOCKS, 0.125), tmp_path
    )
    assert kernels[FORWARD].resources().spilled > 0
