"""The Triton backend of `scale_block_attention` on Triton's interpreter.

test_scale_block_attention_triton.py runs this file.

Triton asks for its interpreter once, as kernels are defined: hence a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import cached_attention, scale_block_attention
from hitsr_fast.ops import scale_block_attention_triton as triton
from tests.ops.test_scale_block_attention import (
    BACKWARD,
    CACHED,
    FORWARD,
    NAMES,
    check_keys_that_score_minus_infinity,
    dense,
    qkv,
)
from tests.tolerances import TOLERANCES

# Tiles are 32 queries by 16 keys, in one pass 16 by 32: whole and cut ones, blocks within one and across two.
BLOCKS = [[1], [5, 1, 30, 17], [70], [40, 3, 64, 9, 33], [33, 32, 31, 1, 1, 64], [16, 16, 32, 64]]


@pytest.fixture(scope="module", autouse=True)
def _backend() -> Iterator[None]:
    """The backend; and products of bfloat16, which the interpreter would take for integers."""
    shipped = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return shipped(self, widened(a), widened(b), *rest)

    with use_backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        patch.setattr(triton, "_INTERPRETED", (*triton._INTERPRETED, torch.bfloat16))
        yield


def check(q: Tensor, k: Tensor, v: Tensor, blocks: list[int], scale: float | None = None) -> None:
    """Output and gradients against a dense mask in float64."""
    weight = torch.randn(q.shape, dtype=q.dtype)
    out = scale_block_attention(q, k, v, block_lengths=blocks, softmax_scale=scale)
    expected = dense(q, k, v, blocks, scale)
    grads = torch.autograd.grad(out, (q, k, v), weight)
    expected_grads = torch.autograd.grad(expected, (q, k, v), weight.double())
    assert out.dtype == q.dtype and out.is_contiguous()
    for actual, want in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(actual.double(), want.double(), **TOLERANCES[NAMES[q.dtype]]._asdict())


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_equals_a_dense_mask(blocks: list[int]) -> None:
    check(*qkv(2, sum(blocks), 2, 20, dtype=torch.float32, grad=True), blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(*qkv(1, 130, 2, 16, dtype=dtype, grad=True), [40, 57, 33])


@pytest.mark.parametrize("head_dim", [1, 16, 40, 64, 100, 128])
def test_head_dimensions(head_dim: int) -> None:
    check(*qkv(1, 75, 1, head_dim, dtype=torch.float32, grad=True), [37, 38], 0.2)


@settings(max_examples=8)
@given(blocks=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_any_blocks(blocks: list[int]) -> None:
    check(*qkv(1, sum(blocks), 1, 3, dtype=torch.float32, grad=True), blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_that_score_minus_infinity(dtype: torch.dtype) -> None:
    check_keys_that_score_minus_infinity(dtype, -torch.inf)


def test_strides() -> None:
    packed = torch.randn(2, 50, 3, 2, 12, requires_grad=True)
    check(*packed.unbind(2), [21, 29])
    check(
        *(t.detach().mT.contiguous().mT.requires_grad_() for t in qkv(2, 50, 3, 8, dtype=torch.float32)),
        [21, 29],
    )


def test_lse_and_scores_far_apart() -> None:
    q, k, v = qkv(1, 60, 2, 8, dtype=torch.float32)
    q *= 8
    _, lse = FORWARD(q, k, v, [25, 35], 0.5)
    scores = 0.5 * q.double().transpose(1, 2) @ k.double().transpose(1, 2).mT
    expected = torch.cat([scores[:, :, :25, :25].logsumexp(-1), scores[:, :, 25:].logsumexp(-1)], dim=2)
    torch.testing.assert_close(lse.double(), expected, **TOLERANCES["float32_reordered"]._asdict())
    check(*(t.requires_grad_() for t in (q, k, v)), [25, 35])


def test_later_blocks_are_invisible() -> None:
    q, k, v = qkv(1, 90, 1, 4, dtype=torch.float32)
    before = scale_block_attention(q, k, v, block_lengths=[20, 30, 40])
    k[:, 50:], v[:, 50:] = 1e3, -1e3
    after = scale_block_attention(q, k, v, block_lengths=[20, 30, 40])
    assert torch.equal(before[:, :50], after[:, :50])
    assert not torch.equal(before[:, 50:], after[:, 50:])


def test_the_same_each_time() -> None:
    def once() -> tuple[Tensor, ...]:
        out, lse = FORWARD(q, k, v, blocks, 0.3)
        cached = CACHED(q[:, :5], k, v, 150, 0.3)
        return out, lse, *BACKWARD(out, q, k, v, out, lse, blocks, 0.3), cached

    blocks = [40, 3, 64, 43]
    q, k, v = qkv(1, 150, 1, 8, dtype=torch.float32)
    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("queries", "length"), [(1, 1), (1, 127), (7, 128), (1, 300), (20, 517), (45, 260)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache(dtype: torch.dtype, queries: int, length: int) -> None:
    """Rows beyond the length hold NaN; from 129 keys on they are split among programs."""
    q = torch.randn(2, queries, 2, 12, dtype=dtype)
    k_cache, v_cache = torch.full((2, 2, length + 9, 2, 12), torch.nan, dtype=dtype)
    k_cache[:, :length], v_cache[:, :length] = torch.randn(2, 2, length, 2, 12, dtype=dtype)
    share, _ = triton.decode_plan(2, queries, 2, 12, length, dtype)
    assert (share < length) == (length > 128)
    out = cached_attention(q, k_cache, v_cache, length)
    keys, values = k_cache[:, :length], v_cache[:, :length]
    weights = torch.einsum("blhd,bthd->bhlt", q.double(), keys.double() / 12**0.5).softmax(-1)
    expected = torch.einsum("bhlt,bthd->blhd", weights, values.double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, **TOLERANCES[NAMES[dtype]]._asdict())


def test_enough_programs_split_nothing() -> None:
    q, k, v = qkv(1, 150, 128, 2, dtype=torch.float32)
    share, _ = triton.decode_plan(1, 3, 128, 2, 150, torch.float32)
    assert share >= 150
    expected = dense(q, k, v, [147, 3])[:, 147:].float()
    out = cached_attention(q[:, 147:], k, v, 150)
    torch.testing.assert_close(out, expected, **TOLERANCES["float32_reordered"]._asdict())


def test_blocks_with_a_cache_equal_the_whole() -> None:
    blocks = [41, 4, 9, 150]
    q, k, v = qkv(1, sum(blocks), 2, 8, dtype=torch.float32)
    whole = scale_block_attention(q, k, v, block_lengths=blocks)
    for length, end in zip(blocks, accumulate(blocks), strict=True):
        rows = slice(end - length, end)
        out = cached_attention(q[:, rows], k, v, end)
        torch.testing.assert_close(out, whole[:, rows], **TOLERANCES["float32_reordered"]._asdict())


def test_nothing_to_do() -> None:
    q, k, v = qkv(0, 5, 2, 4, dtype=torch.float32, grad=True)
    out = scale_block_attention(q, k, v, block_lengths=[2, 3])
    assert out.shape == torch.autograd.grad(out.sum(), k)[0].shape == (0, 5, 2, 4)
    assert cached_attention(q.detach(), k.detach(), v.detach(), 2).shape == (0, 5, 2, 4)


def test_opcheck() -> None:
    q, k, v = qkv(1, 5, 2, 4, dtype=torch.float32, grad=True)
    torch.library.opcheck(FORWARD, (q, k, v, [2, 3], 0.5))
    q, k, v = qkv(1, 5, 2, 4, dtype=torch.float32)
    out, lse = FORWARD(q, k, v, [2, 3], 0.5)
    torch.library.opcheck(BACKWARD, (out, q, k, v, out, lse, [2, 3], 0.5))
    torch.library.opcheck(CACHED, (q[:, :2], k, v, 4, 0.5))
