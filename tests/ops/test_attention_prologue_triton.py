"""The Triton backend of `attention_prologue`: its cases on Triton's interpreter, and when it cannot run."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops.attention_prologue_triton import constants, supports
from tests.ops.interpreter import run_cases
from tests.ops.test_attention_prologue import NAMES, STEPS, check, problem


def test_interpreted() -> None:
    run_cases("attention_prologue_interpreted.py")


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def reason(
        B: int = 1, NH: int = 1, D: int = 2, dtype: torch.dtype = torch.float32, bias: Tensor | None = None
    ) -> str | None:
        cache = torch.empty(1, dtype=dtype).expand(B, 1, NH, D)
        return supports(torch.zeros(B, 1, 1), cache, cache, 0, bias, None, None)

    assert reason() == "needs CUDA or HIP tensors, found cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason() is None
    assert reason(dtype=torch.float64) == "needs float16, bfloat16 or float32, found float64"
    assert reason(bias=torch.zeros(6).double()) == "needs float16, bfloat16 or float32, found float64"
    assert reason(D=1026) == "needs D of at most 1024, found 1026"
    assert reason(B=65536) == "needs B of at most 65535, found 65536"
    assert reason(NH=65536) == "needs NH of at most 65535, found 65536"


def test_blocks_hold_all_heads() -> None:
    for heads, head_dim in product((1, 2, 3, 16, 30), (1, 2, 64, 72, 128, 1000)):
        found = constants(heads, head_dim)
        assert found["BLOCK"] >= max(head_dim, 2) and found["HEADS"] <= 2 * heads
        assert found["HEADS"] * found["BLOCK"] <= max(512, found["BLOCK"])


@pytest.mark.gpu
@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: "+".join(sorted(steps)) or "nothing")
def test_on_a_gpu(steps: set[str]) -> None:
    sizes = [(1, 1, 1, 2, 0, 0), (2, 1024, 16, 64, 16, 0), (1, 70, 30, 72, 3, 1), (1, 7, 2, 1024, 0, 0)]
    for size, dtype, cached in product(sizes, NAMES, NAMES):
        with torch.device("cuda"), use_backend("triton"):
            check(problem(size, dtype, cached, steps))
