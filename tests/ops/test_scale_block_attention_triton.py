"""The Triton backend of `scale_block_attention`: on Triton's interpreter, and what needs no kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.dispatch import operations, use_backend
from hitsr_fast.ops import cached_attention, scale_block_attention
from hitsr_fast.ops import scale_block_attention_triton as triton
from tests.ops.interpreter import run_cases
from tests.ops.test_scale_block_attention import dense
from tests.tolerances import TOLERANCES


def test_interpreted() -> None:
    run_cases("scale_block_attention_interpreted.py")


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend = operations()["cached_attention"].backends["triton"]

    def refusal(q: Tensor, scale: float = 1.0) -> str | None:
        return backend.refusal((q, q, q, 2, scale))

    q = torch.zeros(1, 2, 3, 4)
    assert refusal(q) == "needs CUDA or HIP tensors, found q on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refusal(q) is None
    assert refusal(q.bfloat16()) == "needs a GPU for bfloat16, found Triton's interpreter"
    assert refusal(q.double()) == "needs float16, bfloat16 or float32, found q of float64"
    assert refusal(torch.zeros(1, 1, 1, 129)) == "needs D of at most 128, found 129"
    assert refusal(torch.zeros(65536, 1, 1, 1)) == "needs B of at most 65535, found 65536"
    assert refusal(torch.zeros(1, 1, 65536, 1)) == "needs NH of at most 65535, found 65536"
    for scale in (0.0, -1.0):
        assert refusal(q, scale) == f"needs a softmax_scale above 0, found {scale}"


def test_the_table_of_blocks() -> None:
    table = triton.block_table((2, 1, 3), torch.device("cpu"))
    assert table.dtype == torch.int32
    assert table.tolist() == [[0, 0, 2, 3, 3, 3], [2, 2, 3, 6, 6, 6]]
    assert triton.block_table((2, 1, 3), torch.device("cpu")) is table


@given(
    B=st.integers(1, 300),
    L=st.integers(1, 2000),
    NH=st.integers(1, 40),
    D=st.sampled_from([64, 128]),
    length=st.integers(1, 5000),
)
def test_every_key_has_one_program(B: int, L: int, NH: int, D: int, length: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "_present_family", lambda: "hopper")
        share, constants = triton.decode_plan(B, L, NH, D, length, torch.bfloat16)
    splits = -(-length // share)
    programs = -(-L // constants["BLOCK_M"]) * NH * B
    assert share % constants["BLOCK_N"] == 0
    assert (splits - 1) * share < length <= splits * share
    assert programs >= 128 or splits * programs <= 256 or splits == 1
    assert splits == 1 or programs < 128


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, "float32_reordered"), (torch.bfloat16, "bfloat16"), (torch.float16, "float16")],
)
@pytest.mark.parametrize("head_dim", [20, 64, 128])
def test_on_a_gpu(head_dim: int, dtype: torch.dtype, tolerance: str) -> None:
    for blocks in [[1], [300, 9, 16, 129], [1040, 36, 64, 100, 196]]:
        shape = (2, sum(blocks), 3, head_dim)
        q, k, v = (torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for _ in range(3))
        weight = torch.randn(shape, dtype=dtype, device="cuda")
        with use_backend("triton"):
            out = scale_block_attention(q, k, v, block_lengths=blocks)
            grads = torch.autograd.grad(out, (q, k, v), weight, retain_graph=True)
            again = torch.autograd.grad(out, (q, k, v), weight)
            with torch.no_grad():
                cached = cached_attention(q[:, -blocks[-1] :], k, v, sum(blocks))
        assert all(torch.equal(one, other) for one, other in zip(grads, again, strict=True))
        host = [t.detach().cpu().requires_grad_() for t in (q, k, v)]
        expected = dense(*host, blocks)
        expected_grads = torch.autograd.grad(expected, host, weight.cpu().double())
        pairs = zip(
            (out, cached, *grads), (expected, expected[:, -blocks[-1] :], *expected_grads), strict=True
        )
        for actual, want in pairs:
            torch.testing.assert_close(
                actual.cpu().double(), want.double(), **TOLERANCES[tolerance]._asdict()
            )
