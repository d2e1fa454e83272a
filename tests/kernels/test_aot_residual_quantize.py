"""The kernels of the residual quantizer, compiled for chips that are not here: what they take and run on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hitsr_fast.ops import residual_quantize_triton as triton
from hitsr_fast.ops.residual_quantize_triton import Scale
from tests.kernels.aot import SHARED, TARGETS, TENSOR_CORE, Kernel, compile_launches

CHANNELS = [1, 8, 16, 33, 64, 100, 128, 256]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Instructions of a thread in a turn of the search's loop over its scores, in large blocks, at C = 32.
BUDGET = {"sm_90": 3.0, "sm_100": 3.0}


class Search(NamedTuple):
    """One launch of the search."""

    batch: int
    side: int
    inputs: bool
    metric: str = "l2"
    channels: int = 32
    dtype: torch.dtype = torch.float32

    def launch(self) -> None:
        B, C, side = self.batch, self.channels, self.side
        codebook, z = torch.zeros(4096, C), torch.zeros(B, C, 32, 32, dtype=self.dtype)
        indices = torch.zeros(B, side * side, dtype=torch.int64)
        search = triton._Searcher(codebook, [], "", self.metric)
        inputs = torch.zeros(B, side * side, C) if self.inputs else None
        search(z, Scale(side, side, 0, 0), indices, z.float(), inputs)

    def scores_per_turn(self) -> int:
        rows = self.batch * self.side**2
        blocks = triton.search_constants(self.channels, self.metric, rows, 4)
        return blocks["BLOCK_N"] * blocks["BLOCK_K"] * blocks["PARTS"]


class Update(NamedTuple):
    """One launch of the update."""

    ratio: float = 0.5
    first: bool = False
    residual: bool = True
    packed: bool = True
    channels: int = 32
    dtype: torch.dtype = torch.float32

    def launch(self) -> None:
        C, out = self.channels, torch.zeros(2, self.channels, 32, 32)
        bank = torch.zeros(4, C, C, 3, 3, dtype=self.dtype)
        codebook, bias = torch.zeros(4096, C, dtype=self.dtype), torch.zeros(4, C, dtype=self.dtype)
        bank = triton._by_taps(bank) if self.packed else bank
        update = triton._Updater(codebook, bank, bias, self.ratio, out)
        indices = torch.zeros(2, 3452, dtype=torch.int64)
        before, residual = None if self.first else out, out if self.residual else None
        update(Scale(8, 8, 52, 1), indices, before, out, residual, residual)


class Pool(NamedTuple):
    """One launch of the pooling kernel."""

    side: int
    channels: int = 32

    def launch(self) -> None:
        scale, C = Scale(self.side, self.side, 0, 0), self.channels
        triton._pool(torch.zeros(2, C, 32, 32), scale, torch.zeros(2, self.side**2, C))


def compiled(launch: Callable[[], None], target: str, folder: Path) -> Kernel:
    (kernel,) = compile_launches(TARGETS[target], launch, folder).values()
    return kernel


def spilled(kernel: Kernel, target: str) -> int:
    """Bytes in memory for want of registers, and on AMD vector registers.

    AMD keeps scalars beyond the scalar registers in lanes of vector registers, not in memory.
    """
    if target != "gfx942":
        return kernel.resources().spilled
    fields = ("vgpr_spill_count", "private_segment_fixed_size")
    return sum(int(re.findall(rf"\.{field}:\s+(\d+)", kernel.assembly)[0]) for field in fields)


def check_search(search: Search, target: str, folder: Path) -> Kernel:
    kernel = compiled(search.launch, target, folder)
    assert spilled(kernel, target) == 0, (search, kernel.resources())
    assert kernel.resources().shared <= SHARED[target]
    text = "\n".join(kernel.instructions())
    assert not re.search(r"V_(READ|WRITE)LANE", "\n".join(kernel.product_loop()))
    # The definition multiplies and adds in two steps.
    assert not re.search("DFMA|V_FMA_F64", text)
    assert re.search("DADD|V_ADD_F64", text)
    # What programs exchange is written before it is announced, and read from no cache that may be stale.
    assert not re.search("LDG.*CONSTANT", text)
    assert "GLOBAL_ATOMIC" not in text
    if "ATOMG" in text:
        assert re.search("MEMBAR.*GPU(.|\n)*ATOMG(.|\n)*CCTL.IVALL", text)
    return kernel


def check_update(update: Update, target: str, folder: Path) -> None:
    kernel = compiled(update.launch, target, folder)
    assert spilled(kernel, target) == 0, (update, kernel.resources())
    assert kernel.resources().shared <= SHARED[target]
    products = [line for line in kernel.instructions() if TENSOR_CORE.search(line)]
    if target == "gfx942":  # whose matrix cores have a product of true float32
        assert bool(products) == (update.ratio != 0)
        assert all(re.match(r"V_MFMA_F32_\d+X\d+X\d+_(\dB_)?F32", line) for line in products)
    else:
        assert not products
        if update.ratio != 0:
            share = max(sum("FFMA" in line for line in loop) / len(loop) for loop in kernel.loops())
            assert share > 0.55, (update, share)


def check_pool(pool: Pool, target: str, folder: Path) -> None:
    kernel = compiled(pool.launch, target, folder)
    assert spilled(kernel, target) == 0, (pool, kernel.resources())
    assert kernel.resources().shared <= SHARED[target]


def test_search(tmp_path: Path) -> None:
    many = Search(64, 28, True)
    kernel = check_search(many, "sm_90", tmp_path)
    assert len(kernel.product_loop()) * kernel.threads / many.scores_per_turn() <= BUDGET["sm_90"]
    few = check_search(Search(1, 4, False), "sm_90", tmp_path)
    assert "ATOMG" in "".join(few.instructions())


def test_update_and_pool(tmp_path: Path) -> None:
    check_update(Update(), "sm_90", tmp_path)
    check_update(Update(ratio=0.0), "sm_90", tmp_path)
    check_pool(Pool(28), "sm_90", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("target", TARGETS)
def test_search_as_shipped(target: str, metric: str, tmp_path: Path) -> None:
    """All that HIT's scales ask for: few rows and many, bins of a few places and of more."""
    for batch, side, inputs in [
        (1, 4, True),
        (1, 4, False),
        (1, 28, True),
        (64, 14, True),
        (64, 28, False),
        (64, 28, True),
    ]:
        search = Search(batch, side, inputs, metric)
        kernel = check_search(search, target, tmp_path)
        if batch == 64:
            per_score = len(kernel.product_loop()) * kernel.threads / search.scores_per_turn()
            assert per_score <= BUDGET.get(target, 4.0), (search, per_score)


@pytest.mark.slow
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("target", TARGETS)
def test_search_of_other_widths(target: str, channels: int, tmp_path: Path) -> None:
    for metric in ("l2", "cosine"):
        check_search(Search(1, 4, True, metric, channels), target, tmp_path)
        check_search(Search(64, 14, True, metric, channels), target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*DTYPES[1:], torch.float64])
@pytest.mark.parametrize("target", TARGETS)
def test_search_in_other_latents(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for batch in (1, 64):
        check_search(Search(batch, 10, False, dtype=dtype), target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_update_as_shipped(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for update in (
        Update(dtype=dtype),
        Update(first=True, dtype=dtype),
        Update(residual=False, packed=False, dtype=dtype),
        Update(ratio=0.0, dtype=dtype),
    ):
        check_update(update, target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("target", TARGETS)
def test_update_and_pool_of_other_widths(target: str, channels: int, tmp_path: Path) -> None:
    for ratio in (0.5, 0.0):
        for packed in (True, False):
            check_update(Update(ratio, packed=packed, channels=channels), target, tmp_path)
    for side in (4, 28):
        check_pool(Pool(side, channels), target, tmp_path)
