"""The Triton backend of `nearest_code`: its cases on Triton's interpreter, and when it cannot run."""

from __future__ import annotations

import pytest
import torch

from hitsr_fast.dispatch import BackendUnavailableError, use_backend
from hitsr_fast.ops import nearest_code, nearest_code_triton
from hitsr_fast.reference.nearest_code import nearest_code as reference
from tests.ops.interpreter import run_cases
from tests.ops.test_nearest_code import KINDS, problem


def test_interpreted() -> None:
    run_cases("nearest_code_interpreted.py")


@pytest.mark.slow
def test_interpreted_with_the_sums_of_tensor_cores() -> None:
    run_cases("nearest_code_interpreted.py", "slow")


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, codebook = torch.zeros(2, 3), torch.zeros(4, 3)
    reason = nearest_code_triton.available() or nearest_code_triton.supports(x, codebook, [], "", "l2")
    assert reason is not None
    with use_backend("triton"), pytest.raises(BackendUnavailableError) as error:
        nearest_code(x, codebook)
    assert f"triton      {reason}" in str(error.value)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for a, b, expected in [
        (x.double(), codebook, "needs float16, bfloat16 or float32, found x of float64"),
        (x, codebook.double(), "needs float16, bfloat16 or float32, found codebook of float64"),
        (torch.zeros(1, 257), torch.zeros(1, 257), "needs C of at most 256, found 257"),
        (torch.zeros(65536, 1, 1), torch.zeros(65536, 1, 1), "needs at most 65535 groups, found 65536"),
    ]:
        assert nearest_code_triton.supports(a, b, [], "", "l2") == expected


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_on_a_gpu(kind: str, metric: str) -> None:
    for rows, codes, channels in [(100_000, 4096, 32), (1000, 1030, 33), (300, 16384, 64), (50, 300, 256)]:
        x, codebook = problem(kind, rows, codes, channels)
        with use_backend("triton"):
            found = nearest_code(x.cuda(), codebook.cuda(), metric=metric)  # type: ignore[arg-type]
        assert torch.equal(found.cpu(), reference(x, codebook, metric))
