"""The Triton backend of `modulated_layer_norm`: its cases on Triton's interpreter, and when it cannot run."""

from __future__ import annotations

import pytest
import torch

from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops.modulated_layer_norm_triton import supports
from tests.ops.interpreter import run_cases
from tests.ops.test_modulated_layer_norm import CASES, NAMES, Case, check


def test_interpreted() -> None:
    run_cases("modulated_layer_norm_interpreted.py")


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, row = torch.zeros(1, 2, 3), torch.zeros(1, 3)
    assert supports(x, row, row, 1e-6) == "needs CUDA or HIP tensors, found cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert supports(x, row, row, 1e-6) is None
    assert supports(x, row.double(), row, 1e-6) == "needs float16, bfloat16 or float32, found float64"
    assert supports(torch.zeros(1, 1, 8193), row) == "needs C of at most 8192, found 8193"
    assert supports(torch.zeros(65536, 1, 1), row) == "needs B of at most 65535, found 65536"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=["norm", "residual"])
@pytest.mark.parametrize("dtype", NAMES)
def test_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    for size in [(1, 1, 1), (3, 70, 100), (2, 1024, 1024), (1, 7, 8192)]:
        inputs = [t.detach().cuda().requires_grad_() for t in case[2](*size, dtype)]
        with torch.device("cuda"), use_backend("triton"):
            check(case, inputs, NAMES[dtype])
