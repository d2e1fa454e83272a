"""`scale_block_attention` on each backend against a dense mask; attention to a cache against the whole."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast import extension
from hitsr_fast.backends import instruction_sets
from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import cached_attention, scale_block_attention
from tests.tolerances import TOLERANCES

BUILT = extension.unavailable() is None
KERNELS = ("amx_bf16", "avx512", "avx2", "portable")  # avx512_bf16 runs that of avx512
BACKENDS = ["cpu", "reference"]
COMPILED = [f"cpu:{isa}" for isa in KERNELS if isa in instruction_sets()] if BUILT else []
FORWARD = torch.ops.hitsr_fast.scale_block_attention.default
BACKWARD = torch.ops.hitsr_fast.scale_block_attention_backward.default
CACHED = torch.ops.hitsr_fast.cached_attention.default
NAMES = {torch.float32: "float32_reordered", torch.bfloat16: "bfloat16", torch.float16: "float16"}
ROUNDINGS = 4  # of the largest value, beside twice PyTorch's error


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """`use_backend`; the CPU's may name an instruction set behind a colon."""
    name, _, isa = backend.partition(":")
    with pytest.MonkeyPatch.context() as patch, use_backend(name):
        if isa:
            patch.setenv("HITSR_FAST_CPU_ISA", isa)
        yield


def qkv(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for _ in range(3)]


def dense(q: Tensor, k: Tensor, v: Tensor, block_lengths: list[int], scale: float | None = None) -> Tensor:
    """The same with an explicit mask, in float64."""
    block = torch.repeat_interleave(torch.arange(len(block_lengths)), torch.tensor(block_lengths))
    mask = block[:, None] >= block[None, :]
    query, key, value = (t.double().transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    block_lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    scale=st.sampled_from([None, 0.3]),
)
def test_equals_a_dense_mask(
    backend: str, block_lengths: list[int], batch: int, heads: int, head_dim: int, scale: float | None
) -> None:
    q, k, v = qkv(batch, sum(block_lengths), heads, head_dim)
    with use_backend(backend):
        out = scale_block_attention(q, k, v, block_lengths=block_lengths, softmax_scale=scale)
    assert out.is_contiguous()
    expected = dense(q, k, v, block_lengths, scale)
    torch.testing.assert_close(out, expected, **TOLERANCES["float64_reordered"]._asdict())


@pytest.mark.parametrize("backend", BACKENDS + COMPILED)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, "float32_reordered"), (torch.bfloat16, "bfloat16"), (torch.float16, "float16")],
)
def test_lower_precision_and_long_blocks(backend: str, dtype: torch.dtype, tolerance: str) -> None:
    # 300 rows in a block: more than the reference's chunk.
    blocks = [300, 9, 16]
    q, k, v = qkv(1, 325, 2, 8, dtype=dtype, grad=True)
    weight = torch.randn(1, 325, 2, 8, dtype=dtype)
    with forced(backend):
        out = scale_block_attention(q, k, v, block_lengths=blocks)
    grads = torch.autograd.grad(out, (q, k, v), weight)
    expected = dense(q, k, v, blocks)
    expected_grads = torch.autograd.grad(expected, (q, k, v), weight.double())
    assert out.dtype == dtype
    for actual, want in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(actual.double(), want.double(), **TOLERANCES[tolerance]._asdict())


@pytest.mark.parametrize("backend", BACKENDS + COMPILED)
def test_gradients_of_many_blocks_are_summed_in_float32(backend: str) -> None:
    # Token i adds about 1 / i to the gradients of the first key and value: a sum that is kept in bfloat16
    # takes none of them from i = 64 on.
    T, D = 300, 4
    q, k, v = (torch.zeros(1, T, 1, D, dtype=torch.bfloat16) for _ in range(3))
    q[:], v[:, 0] = 1, 1
    inputs = [t.requires_grad_() for t in (q, k, v)]
    with forced(backend):
        out = scale_block_attention(q, k, v, block_lengths=[1] * T)
    grads = torch.autograd.grad(out.sum(), inputs)
    expected = torch.autograd.grad(dense(q, k, v, [1] * T).sum(), inputs)
    for actual, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, want, **TOLERANCES["bfloat16"]._asdict())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda q, k, v: scale_block_attention(q, k, v, block_lengths=[2, 1, 3], softmax_scale=0.7),
            qkv(1, 6, 2, 3, grad=True),
            **TOLERANCES["gradcheck"]._asdict(),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_later_blocks_are_invisible(backend: str) -> None:
    q, k, v = qkv(1, 9, 2, 4)
    with use_backend(backend):
        before = scale_block_attention(q, k, v, block_lengths=[2, 3, 4])
        k[:, 5:], v[:, 5:] = 1e3, -1e3
        after = scale_block_attention(q, k, v, block_lengths=[2, 3, 4])
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input(backend: str) -> None:
    packed = torch.randn(2, 7, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    with use_backend(backend):
        out = scale_block_attention(*packed.unbind(2), block_lengths=[3, 4])
    weight = torch.randn(4, 2, 7, 2, dtype=torch.float64).permute(1, 2, 3, 0)
    (grad,) = torch.autograd.grad(out, packed, weight)
    expected = dense(*packed.unbind(2), [3, 4])
    (expected_grad,) = torch.autograd.grad(expected, packed, weight)
    torch.testing.assert_close(out, expected, **TOLERANCES["float64_reordered"]._asdict())
    torch.testing.assert_close(grad, expected_grad, **TOLERANCES["float64_reordered"]._asdict())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_last_axis_with_a_stride(backend: str, dtype: torch.dtype) -> None:
    q, k, v = (t.mT.contiguous().mT.requires_grad_() for t in qkv(2, 7, 3, 8, dtype=dtype))
    assert q.stride(-1) != 1
    with use_backend(backend):
        out = scale_block_attention(q, k, v, block_lengths=[3, 4])
    expected = dense(q, k, v, [3, 4])
    tolerance = TOLERANCES["float64_reordered" if dtype == torch.float64 else "bfloat16"]._asdict()
    torch.testing.assert_close(out.double(), expected, **tolerance)
    grads, expected_grads = (torch.autograd.grad(t.sum(), (q, k, v)) for t in (out, expected))
    for actual, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, want, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_is_the_log_of_the_denominator(backend: str) -> None:
    q, k, v = qkv(1, 5, 2, 4)
    with use_backend(backend):
        _, lse = FORWARD(q, k, v, [2, 3], 0.5)
    scores = 0.5 * q.transpose(1, 2) @ k.transpose(1, 2).mT
    expected = torch.cat([scores[:, :, :2, :2].logsumexp(-1), scores[:, :, 2:].logsumexp(-1)], dim=2)
    torch.testing.assert_close(lse, expected, **TOLERANCES["float64_reordered"]._asdict())


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_on_request(backend: str) -> None:
    q, k, v = qkv(1, 5, 2, 4, dtype=torch.bfloat16, grad=True)
    with use_backend(backend):
        out, lse = scale_block_attention(q, k, v, block_lengths=[2, 3], softmax_scale=0.5, return_lse=True)
        assert torch.equal(out, scale_block_attention(q, k, v, block_lengths=[2, 3], softmax_scale=0.5))
        assert torch.equal(lse, FORWARD(q, k, v, [2, 3], 0.5)[1])
    assert lse.shape == (1, 2, 5) and lse.dtype == torch.float32
    assert out.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@given(block_lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), room=st.integers(0, 3))
def test_blocks_with_a_cache_equal_the_whole(backend: str, block_lengths: list[int], room: int) -> None:
    T = sum(block_lengths)
    q, k, v = qkv(2, T, 2, 4)
    k_cache, v_cache = (torch.full((2, T + room, 2, 4), torch.nan, dtype=torch.float64) for _ in range(2))
    outs = []
    for length, end in zip(block_lengths, accumulate(block_lengths), strict=True):
        rows = slice(end - length, end)
        k_cache[:, rows], v_cache[:, rows] = k[:, rows], v[:, rows]
        with use_backend(backend):
            outs.append(cached_attention(q[:, rows], k_cache, v_cache, end))
    expected = scale_block_attention(q, k, v, block_lengths=block_lengths)
    torch.testing.assert_close(torch.cat(outs, 1), expected, **TOLERANCES["float64_reordered"]._asdict())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [1, 9, 300])  # fewer than keys, more, and more than the reference's chunk
def test_queries_of_a_cache_need_not_be_its_last_rows(backend: str, queries: int) -> None:
    q, k, v = torch.randn(2, queries, 2, 4).double(), *(torch.randn(2, 8, 2, 4).double() for _ in range(2))
    with use_backend(backend):
        out = cached_attention(q, k, v, 5, softmax_scale=-0.4)
    assert out.is_contiguous()
    query, key, value = (t.transpose(1, 2) for t in (q, k[:, :5], v[:, :5]))
    expected = ((query @ key.mT * -0.4).softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(out, expected, **TOLERANCES["float64_reordered"]._asdict())


# --- the compiled kernels


def assert_as_exact_as_pytorch(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: list[int], scale: float | None = None
) -> None:
    """At most twice the error of PyTorch's own attention in that dtype, and a few roundings."""
    exact = dense(q, k, v, blocks, scale)
    with use_backend("reference"):
        pytorch = scale_block_attention(q, k, v, block_lengths=blocks, softmax_scale=scale)
    assert out.dtype == q.dtype and out.is_contiguous()
    allowed = 2 * (pytorch.double() - exact).abs().max()
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[q.dtype]
    error = (out.double() - exact).abs().max()
    assert error <= allowed + ROUNDINGS * unit * v.double().abs().max(), (error, allowed)


@pytest.mark.parametrize("backend", COMPILED)
@given(
    blocks=st.lists(st.one_of(st.integers(1, 9), st.integers(30, 150)), min_size=1, max_size=4),
    batch=st.integers(1, 2),
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([1, 3, 8, 17, 32, 40, 64, 96, 128, 130]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([None, 0.3, 0.0, -0.2]),
)
def test_kernels_of_each_instruction_set(
    backend: str, blocks: list[int], batch: int, heads: int, head_dim: int, dtype: torch.dtype, scale: float
) -> None:
    q, k, v = qkv(batch, sum(blocks), heads, head_dim, dtype=dtype)
    with forced(backend):
        out = scale_block_attention(q, k, v, block_lengths=blocks, softmax_scale=scale)
    assert_as_exact_as_pytorch(out, q, k, v, blocks, scale)


@pytest.mark.parametrize("backend", COMPILED)
@given(
    blocks=st.lists(st.one_of(st.integers(1, 9), st.integers(30, 150)), min_size=1, max_size=4),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 17, 32, 40, 64, 128, 130]),
    scale=st.sampled_from([None, 0.0, -0.2]),
)
def test_gradients_of_each_instruction_set(
    backend: str, blocks: list[int], batch: int, heads: int, head_dim: int, scale: float | None
) -> None:
    fused = torch.randn(batch, sum(blocks), 3, heads, head_dim)
    inputs = [part.requires_grad_() for part in fused.unbind(2)]
    weight = torch.randn(heads, head_dim, batch, sum(blocks)).permute(2, 3, 0, 1)

    def gradients(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        with forced(name):
            out = scale_block_attention(
                *(t.to(dtype) for t in inputs), block_lengths=blocks, softmax_scale=scale
            )
            return torch.autograd.grad(out, inputs, weight.to(dtype))

    exact = gradients("reference", torch.float64)
    for found, pytorch, want in zip(gradients(backend), gradients("reference"), exact, strict=True):
        assert found.is_contiguous()
        allowed = 2 * (pytorch - want).abs().max() + ROUNDINGS * 2.0**-23 * (1 + want.abs().max())
        assert (found - want).abs().max() <= allowed


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peaks_that_rise_and_scores_that_are_far_apart(backend: str, dtype: torch.dtype) -> None:
    # Each block of keys scores higher than all before, by more than the headroom; the first score 200 less.
    T = 700
    q, k, v = qkv(1, T, 2, 16, dtype=torch.float32)
    q[..., 0], k[..., 0] = 1.0, torch.arange(T)[None, :, None] * 0.3
    q, k, v = (t.to(dtype) for t in (q, k, v))
    with forced(backend):
        out, lse = FORWARD(q, k, v, [600, 100], 1.0)
    assert_as_exact_as_pytorch(out, q, k, v, [600, 100], 1.0)
    scores = q.double().transpose(1, 2) @ k.double().transpose(1, 2).mT
    expected = torch.cat([scores[:, :, :600, :600].logsumexp(-1), scores[:, :, 600:].logsumexp(-1)], dim=2)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, **TOLERANCES["float32_lse"]._asdict())


@pytest.mark.parametrize("backend", ["cpu", *COMPILED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_where_they_are_seen(backend: str, dtype: torch.dtype) -> None:
    blocks = [45, 30, 7]
    q, k, v = qkv(1, 82, 2, 40, dtype=dtype)
    with forced(backend):
        before = scale_block_attention(q, k, v, block_lengths=blocks)
        k[:, 45:], v[:, 45:60], v[:, 60:] = torch.nan, torch.inf, torch.nan
        after = scale_block_attention(q, k, v, block_lengths=blocks)
    assert torch.equal(before[:, :45], after[:, :45])
    assert after[:, 45:].isnan().all()


def check_keys_that_score_minus_infinity(dtype: torch.dtype, low: float) -> None:
    """First tiles of keys without weight, whose scores may overflow; rows that see no others are NaN."""
    q, k, v = (
        torch.ones(1, 200, 1, 4, dtype=dtype),
        torch.zeros(1, 200, 1, 4, dtype=dtype),
        torch.randn(1, 200, 1, 4),
    )
    k[:, :130], v = low, v.to(dtype)
    if low > -torch.inf:
        q *= -low
    out, lse = FORWARD(q, k, v, [100, 50, 50], 1.0)
    ends = ((100, 150, 150), (150, 200, 200))
    assert out[:, :100].isnan().all() and (lse[..., :100] == -torch.inf).all()
    for first, last, end in ends:
        expected = v[:, 130:end].double().mean(1, keepdim=True).expand(-1, last - first, -1, -1)
        torch.testing.assert_close(
            out[:, first:last].double(), expected, **TOLERANCES[NAMES[dtype]]._asdict()
        )
        cached = CACHED(q[:, first:last], k, v, end, 1.0)
        torch.testing.assert_close(cached.double(), expected, **TOLERANCES[NAMES[dtype]]._asdict())


@pytest.mark.parametrize("backend", ["reference", "cpu", *COMPILED])
@pytest.mark.parametrize("dtype", NAMES)
def test_keys_that_score_minus_infinity(backend: str, dtype: torch.dtype) -> None:
    with forced(backend):
        check_keys_that_score_minus_infinity(dtype, -torch.inf)
        if dtype != torch.float16:
            check_keys_that_score_minus_infinity(dtype, -1e20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (1, 3, 0, 4), (1, 3, 2, 0)], ids=str)
def test_nothing_to_do(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    with forced(backend):
        x = torch.zeros(shape, dtype=dtype, requires_grad=True)
        out = scale_block_attention(x, x, x, block_lengths=[2, 1], softmax_scale=1.0)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert out.shape == grad.shape == shape
        with torch.no_grad():
            assert cached_attention(x, x, x, 3, softmax_scale=1.0).shape == shape


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(backend: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(1, 460, 5, 24, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with forced(backend):
                out, lse = FORWARD(q, k, v, [260, 40, 160], 0.2)
                results.append((out, lse, *BACKWARD(out, q, k, v, out, lse, [260, 40, 160], 0.2)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_read_any_strides(backend: str, dtype: torch.dtype) -> None:
    fused = torch.randn(2, 90, 3, 2, 24, dtype=dtype)
    q, k, v = fused.unbind(2)
    spread = k.mT.contiguous().mT
    assert spread.stride(-1) != 1
    with forced(backend):
        expected = scale_block_attention(*(t.contiguous() for t in (q, k, v)), block_lengths=[50, 40])
        assert torch.equal(scale_block_attention(q, spread, v, block_lengths=[50, 40]), expected)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_with_a_cache(backend: str, dtype: torch.dtype) -> None:
    blocks = [70, 1, 33, 150]
    T = sum(blocks)
    q, k, v = qkv(2, T, 3, 16, dtype=dtype)
    k_cache, v_cache = (torch.full((2, T + 9, 3, 16), torch.nan, dtype=dtype) for _ in range(2))
    with forced(backend):
        whole = scale_block_attention(q, k, v, block_lengths=blocks)
        for length, end in zip(blocks, accumulate(blocks), strict=True):
            rows = slice(end - length, end)
            k_cache[:, rows], v_cache[:, rows] = k[:, rows], v[:, rows]
            assert torch.equal(cached_attention(q[:, rows], k_cache, v_cache, end), whole[:, rows])


def test_an_instruction_set_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CPU_ISA", "neon")
    error, message = (ValueError, "HITSR_FAST_CPU_ISA") if BUILT else (RuntimeError, "not built")
    with use_backend("cpu"), pytest.raises(error, match=message):
        scale_block_attention(*qkv(1, 5, 2, 4, dtype=torch.float32), block_lengths=[5])


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hitsr_fast.extension.unavailable", lambda: "not built")
    q, k, v = qkv(1, 50, 2, 8, dtype=torch.float32)
    with use_backend("cpu"):
        out = scale_block_attention(q, k, v, block_lengths=[20, 30])
        first = cached_attention(q[:, :20], k, v, 20)
    tolerance = TOLERANCES["float32_reordered"]._asdict()
    torch.testing.assert_close(out.double(), dense(q, k, v, [20, 30]), **tolerance)
    torch.testing.assert_close(first, out[:, :20], **tolerance)


def test_second_derivatives_are_refused() -> None:
    q, k, v = qkv(1, 2, 1, 2, grad=True)
    out = scale_block_attention(q, k, v, block_lengths=[1, 1])
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        grad.sum().backward()


def test_bad_arguments() -> None:
    q, k, v = qkv(1, 5, 2, 4)
    with pytest.raises(TypeError, match="q: expected dtype"):
        scale_block_attention(q.int(), k, v, block_lengths=[5])
    with pytest.raises(TypeError, match="k: expected dtype float64, found float32"):
        scale_block_attention(q, k.float(), v, block_lengths=[5])
    with pytest.raises(ValueError, match=r"v: expected shape \(B=1, T=5, NH=2, D=4\), found \(1, 4, 2, 4\)"):
        scale_block_attention(q, k, v[:, 1:], block_lengths=[5])
    expected = "block_lengths: expected integers of at least 1 with sum T=5, found "
    for lengths in ([], [4], [5, 0], [6, -1], np.array([2, 2])):
        with pytest.raises(ValueError, match=re.escape(f"{expected}{list(lengths)}")):
            scale_block_attention(q, k, v, block_lengths=lengths)
    for bad, found in [
        (3, "3"),
        (None, "None"),
        ("five", "['f', 'i', 'v', 'e']"),
        ([1.0, 4.0], "[1.0, 4.0]"),
        ([2, None], "[2, None]"),
        (torch.tensor([2, 3]), "[tensor(2), tensor(3)]"),
        (torch.tensor(5), "tensor(5)"),
    ]:
        with pytest.raises(TypeError, match=re.escape(expected + found)):
            scale_block_attention(q, k, v, block_lengths=bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="softmax_scale: expected a finite number, found '1'"):
        scale_block_attention(q, k, v, block_lengths=[5], softmax_scale="1")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="softmax_scale: expected a finite number, found Parameter"):
        scale_block_attention(q, k, v, block_lengths=[5], softmax_scale=torch.nn.Parameter(torch.ones(())))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="softmax_scale: expected a finite number, found nan"):
        scale_block_attention(q, k, v, block_lengths=[5], softmax_scale=math.nan)


def test_block_lengths_of_any_iterable() -> None:
    q, k, v = qkv(1, 5, 2, 4)
    expected = scale_block_attention(q, k, v, block_lengths=[2, 3])
    for lengths in ((2, 3), range(2, 4), np.array([2, 3]), (length for length in (2, 3))):
        found = scale_block_attention(q, k, v, block_lengths=lengths)  # type: ignore[call-overload]
        assert torch.equal(found, expected)


def test_no_channels() -> None:
    """A scale must be given: `1 / sqrt(D)` is none."""
    q, k, v = qkv(1, 5, 2, 0)
    message = "softmax_scale: expected a number where D is 0, found None"
    with pytest.raises(ValueError, match=message):
        scale_block_attention(q, k, v, block_lengths=[5])
    with pytest.raises(ValueError, match=message):
        cached_attention(q, k, v, 5)
    assert cached_attention(q, k, v, 5, softmax_scale=1.0).shape == (1, 5, 2, 0)


def test_bad_arguments_of_a_cache() -> None:
    q, k, v = (t[:, :n] for t, n in zip(qkv(1, 5, 2, 4), (2, 5, 5), strict=True))
    for length in (-1, 0, 6):
        with pytest.raises(
            ValueError, match=f"length: expected an integer from 1 to Tmax = 5, found {length}"
        ):
            cached_attention(q, k, v, length)
    for bad in (2.0, None, "2"):
        with pytest.raises(TypeError, match=f"length: expected an integer from 1 to Tmax = 5, found {bad!r}"):
            cached_attention(q, k, v, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"k_cache: expected shape \(B=1, Tmax, NH=2, D=4\), found \(5,\)"):
        cached_attention(q, k[0, :, 0, 0], v, 3)
    with pytest.raises(ValueError, match=r"v_cache: expected shape \(B=1, Tmax=5, NH=2, D=4\)"):
        cached_attention(q, k, v[:, 1:], 3)
    with pytest.raises(TypeError, match="k_cache: expected dtype float64"):
        cached_attention(q, k.float(), v, 3)
    with pytest.raises(RuntimeError, match="cached_attention: has no gradient"):
        cached_attention(q.requires_grad_(), k, v, 3)
    with torch.no_grad():
        assert cached_attention(q, k, v, 3).shape == (1, 2, 2, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    with use_backend(backend):
        q, k, v = qkv(1, 5, 2, 4, dtype=torch.float32, grad=True)
        torch.library.opcheck(FORWARD, (q, k, v, [2, 3], 0.5))
        q, k, v = qkv(1, 5, 2, 4, dtype=torch.bfloat16)
        out, lse = FORWARD(q, k, v, [2, 3], 0.5)
        torch.library.opcheck(BACKWARD, (out, q, k, v, out, lse, [2, 3], 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_with_a_cache(backend: str) -> None:
    q, k, v = qkv(1, 7, 2, 4, dtype=torch.float32)
    with use_backend(backend):
        torch.library.opcheck(CACHED, (q[:, :3], k, v, 5, 0.5))


def test_compiles_without_a_graph_break() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scale_block_attention(q.sin(), k, v, block_lengths=[2, 3]).cos()

    inputs = qkv(1, 5, 2, 4, grad=True)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for actual, want in zip(
        (compiled(*inputs), *torch.autograd.grad(compiled(*inputs).sum(), inputs)),
        (forward(*inputs), *torch.autograd.grad(forward(*inputs).sum(), inputs)),
        strict=True,
    ):
        assert torch.equal(actual, want)


def test_a_cache_compiles_without_a_graph_break() -> None:
    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int) -> Tensor:
        k_cache[:, length - 3 : length] = q.cos()
        return cached_attention(q, k_cache, v_cache, length) + 1

    q, k, v = (t[:, :n] for t, n in zip(qkv(1, 9, 2, 4), (3, 9, 9), strict=True))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for length in (4, 7, 9):  # from the second on, length is dynamic
        expected = step(q, k.clone(), v, length)
        assert torch.equal(compiled(q, k, v, length), expected)
        assert torch.equal(k[:, length - 3 : length], q.cos())
