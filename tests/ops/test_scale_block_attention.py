"""`scale_block_attention` on each backend against a dense mask; attention to a cache against the whole."""

from __future__ import annotations

import math
import re
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast import extension
from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import cached_attention, scale_block_attention
from hitsr_fast.ops import scale_block_attention_triton as triton
from tests.ops.backends import INTERPRETED, fewer_when_interpreted, refusal, sizes
from tests.tolerances import TOLERANCES

FORWARD = torch.ops.hitsr_fast.scale_block_attention.default
BACKWARD = torch.ops.hitsr_fast.scale_block_attention_backward.default
CACHED = torch.ops.hitsr_fast.cached_attention.default
NAMES = {
    torch.float32: "float32_reordered",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64_reordered",
}
DTYPES = list(NAMES)[:3]
ROUNDINGS = 4  # of the largest value, beside twice PyTorch's error
# Triton's tiles are 32 queries by 16 keys, in one pass 16 by 32: whole and cut ones, blocks within one and
# across two. 300 rows in a block are more than the reference's chunk.
TILES = [
    [1],
    [5, 1, 30, 17],
    [70],
    [40, 57, 33],
    [40, 3, 64, 9, 33],
    [33, 32, 31, 1, 1, 64],
    [16, 16, 32, 64],
]
BLOCKS = {
    "any": [*TILES, [300, 9, 16]],
    "interpreted": TILES,
    "gpu": [[1], [300, 9, 16, 129], [1040, 36, 64, 100, 196]],
}


def finest(backend: str) -> torch.dtype:
    """float64 where PyTorch computes, and for one instruction set; float32 where the kernels do."""
    return torch.float64 if backend in ("reference", "cpu:portable") else torch.float32


def qkv(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for _ in range(3)]


def dense(q: Tensor, k: Tensor, v: Tensor, block_lengths: list[int], scale: float | None = None) -> Tensor:
    """The same with an explicit mask, in float64."""
    block = torch.repeat_interleave(torch.arange(len(block_lengths)), torch.tensor(block_lengths))
    mask = block[:, None] >= block[None, :]
    query, key, value = (t.double().transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


def check(q: Tensor, k: Tensor, v: Tensor, blocks: list[int], scale: float | None = None) -> None:
    """Output and gradients against a dense mask in float64; the gradient that comes in is strided."""
    weight = torch.randn(q.shape[::-1], dtype=q.dtype).permute(3, 2, 1, 0)
    out = scale_block_attention(q, k, v, block_lengths=blocks, softmax_scale=scale)
    expected = dense(q, k, v, blocks, scale)
    grads = torch.autograd.grad(out, (q, k, v), weight)
    expected_grads = torch.autograd.grad(expected, (q, k, v), weight.double())
    assert out.dtype == q.dtype and out.is_contiguous()
    for actual, want in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(actual.double(), want.double(), **TOLERANCES[NAMES[q.dtype]]._asdict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_a_dense_mask(backend: str, dtype: torch.dtype) -> None:
    for blocks in sizes(backend, BLOCKS):
        if not INTERPRETED or dtype == torch.float32 or blocks == TILES[3]:
            check(*qkv(1, sum(blocks), 2, 16, dtype=dtype, grad=True), blocks)


@fewer_when_interpreted
@given(
    blocks=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    scale=st.sampled_from([None, 0.3]),
)
def test_any_blocks(
    backend: str, blocks: list[int], batch: int, heads: int, head_dim: int, scale: float | None
) -> None:
    inputs = qkv(batch, sum(blocks), heads, head_dim, dtype=finest(backend), grad=True)
    check(*inputs, blocks, scale)


@pytest.mark.parametrize("head_dim", [1, 16, 40, 64, 100, 128])
def test_head_dimensions(backend: str, head_dim: int) -> None:
    check(*qkv(1, 75, 1, head_dim, dtype=torch.float32, grad=True), [37, 38], 0.2)


def test_gradients_of_many_blocks_are_summed_in_float32(backend: str) -> None:
    # Token i adds about 1 / i to the gradients of the first key and value: a sum that is kept in bfloat16
    # takes none of them from i = 64 on.
    T, D = 300, 4
    q, k, v = (torch.zeros(1, T, 1, D, dtype=torch.bfloat16) for _ in range(3))
    q[:], v[:, 0] = 1, 1
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = scale_block_attention(q, k, v, block_lengths=[1] * T)
    grads = torch.autograd.grad(out.sum(), inputs)
    expected = torch.autograd.grad(dense(q, k, v, [1] * T).sum(), inputs)
    for actual, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, want, **TOLERANCES["bfloat16"]._asdict())


@pytest.mark.backends("reference", "cpu:portable")
def test_gradcheck(backend: str) -> None:
    assert torch.autograd.gradcheck(
        lambda q, k, v: scale_block_attention(q, k, v, block_lengths=[2, 1, 3], softmax_scale=0.7),
        qkv(1, 6, 2, 3, grad=True),
        **TOLERANCES["gradcheck"]._asdict(),
    )


def test_later_blocks_are_invisible(backend: str) -> None:
    q, k, v = qkv(1, 90, 2, 4, dtype=finest(backend))
    before = scale_block_attention(q, k, v, block_lengths=[20, 30, 40])
    k[:, 50:], v[:, 50:] = 1e3, -1e3
    after = scale_block_attention(q, k, v, block_lengths=[20, 30, 40])
    assert torch.equal(before[:, :50], after[:, :50])
    assert not torch.equal(before[:, 50:], after[:, 50:])


def test_strided_input(backend: str) -> None:
    dtype = finest(backend)
    check(*torch.randn(2, 50, 3, 2, 12, dtype=dtype, requires_grad=True).unbind(2), [21, 29])
    for kind in (dtype, torch.bfloat16):
        q, k, v = (t.mT.contiguous().mT.requires_grad_() for t in qkv(2, 50, 3, 8, dtype=kind))
        assert q.stride(-1) != 1
        check(q, k, v, [21, 29])


def test_lse_is_the_log_of_the_denominator(backend: str) -> None:
    q, k, v = qkv(1, 60, 2, 8, dtype=finest(backend))
    q *= 8  # scores far apart
    _, lse = FORWARD(q, k, v, [25, 35], 0.5)
    scores = 0.5 * q.double().transpose(1, 2) @ k.double().transpose(1, 2).mT
    expected = torch.cat([scores[:, :, :25, :25].logsumexp(-1), scores[:, :, 25:].logsumexp(-1)], dim=2)
    torch.testing.assert_close(lse.double(), expected, **TOLERANCES[NAMES[q.dtype]]._asdict())
    check(*(t.requires_grad_() for t in (q, k, v)), [25, 35])


def test_lse_on_request(backend: str) -> None:
    q, k, v = qkv(1, 5, 2, 4, dtype=torch.bfloat16, grad=True)
    out, lse = scale_block_attention(q, k, v, block_lengths=[2, 3], softmax_scale=0.5, return_lse=True)
    assert torch.equal(out, scale_block_attention(q, k, v, block_lengths=[2, 3], softmax_scale=0.5))
    assert torch.equal(lse, FORWARD(q, k, v, [2, 3], 0.5)[1])
    assert lse.shape == (1, 2, 5) and lse.dtype == torch.float32
    assert out.requires_grad and not lse.requires_grad


@fewer_when_interpreted
@given(block_lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), room=st.integers(0, 3))
def test_blocks_with_a_cache_equal_the_whole(backend: str, block_lengths: list[int], room: int) -> None:
    T, dtype = sum(block_lengths), finest(backend)
    q, k, v = qkv(2, T, 2, 4, dtype=dtype)
    k_cache, v_cache = (torch.full((2, T + room, 2, 4), torch.nan, dtype=dtype) for _ in range(2))
    outs = []
    for length, end in zip(block_lengths, accumulate(block_lengths), strict=True):
        rows = slice(end - length, end)
        k_cache[:, rows], v_cache[:, rows] = k[:, rows], v[:, rows]
        outs.append(cached_attention(q[:, rows], k_cache, v_cache, end))
    expected = dense(q, k, v, block_lengths).to(dtype)
    torch.testing.assert_close(torch.cat(outs, 1), expected, **TOLERANCES[NAMES[dtype]]._asdict())


@pytest.mark.parametrize(("queries", "length"), [(1, 1), (1, 127), (7, 128), (1, 300), (20, 517), (45, 260)])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_cache(backend: str, dtype: torch.dtype, queries: int, length: int) -> None:
    """Rows beyond the length hold NaN; from 129 keys on Triton splits them among programs."""
    q = torch.randn(2, queries, 2, 12, dtype=dtype)
    k_cache, v_cache = torch.full((2, 2, length + 9, 2, 12), torch.nan, dtype=dtype)
    k_cache[:, :length], v_cache[:, :length] = torch.randn(2, 2, length, 2, 12, dtype=dtype)
    if INTERPRETED:
        share, _ = triton.decode_plan(2, queries, 2, 12, length, dtype)
        assert (share < length) == (length > 128)
    out = cached_attention(q, k_cache, v_cache, length)
    keys, values = k_cache[:, :length], v_cache[:, :length]
    weights = torch.einsum("blhd,bthd->bhlt", q.double(), keys.double() / 12**0.5).softmax(-1)
    expected = torch.einsum("bhlt,bthd->blhd", weights, values.double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, **TOLERANCES[NAMES[dtype]]._asdict())


@pytest.mark.backends("reference", "cpu")
@pytest.mark.parametrize("queries", [1, 9, 300])  # fewer than keys, more, and more than the reference's chunk
def test_queries_of_a_cache_need_not_be_its_last_rows(backend: str, queries: int) -> None:
    dtype = finest(backend)
    q, k, v = (torch.randn(2, length, 2, 4, dtype=dtype) for length in (queries, 8, 8))
    out = cached_attention(q, k, v, 5, softmax_scale=-0.4)
    assert out.is_contiguous()
    query, key, value = (t.transpose(1, 2) for t in (q, k[:, :5], v[:, :5]))
    expected = ((query @ key.mT * -0.4).softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(out, expected, **TOLERANCES[NAMES[dtype]]._asdict())


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


@pytest.mark.backends("cpu")
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
    out = scale_block_attention(q, k, v, block_lengths=blocks, softmax_scale=scale)
    assert_as_exact_as_pytorch(out, q, k, v, blocks, scale)


@pytest.mark.backends("cpu")
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

    def gradients(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        out = scale_block_attention(*(t.to(dtype) for t in inputs), block_lengths=blocks, softmax_scale=scale)
        return torch.autograd.grad(out, inputs, weight.to(dtype))

    with use_backend("reference"):
        exact, reference = gradients(torch.float64), gradients()
    for found, pytorch, want in zip(gradients(), reference, exact, strict=True):
        assert found.is_contiguous()
        allowed = 2 * (pytorch - want).abs().max() + ROUNDINGS * 2.0**-23 * (1 + want.abs().max())
        assert (found - want).abs().max() <= allowed


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peaks_that_rise_and_scores_that_are_far_apart(backend: str, dtype: torch.dtype) -> None:
    # Each block of keys scores higher than all before, by more than the headroom; the first score 200 less.
    T = 700
    q, k, v = qkv(1, T, 2, 16, dtype=torch.float32)
    q[..., 0], k[..., 0] = 1.0, torch.arange(T)[None, :, None] * 0.3
    q, k, v = (t.to(dtype) for t in (q, k, v))
    out, lse = FORWARD(q, k, v, [600, 100], 1.0)
    assert_as_exact_as_pytorch(out, q, k, v, [600, 100], 1.0)
    scores = q.double().transpose(1, 2) @ k.double().transpose(1, 2).mT
    expected = torch.cat([scores[:, :, :600, :600].logsumexp(-1), scores[:, :, 600:].logsumexp(-1)], dim=2)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, **TOLERANCES["float32_lse"]._asdict())


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_where_they_are_seen(backend: str, dtype: torch.dtype) -> None:
    blocks = [45, 30, 7]
    q, k, v = qkv(1, 82, 2, 40, dtype=dtype)
    before = scale_block_attention(q, k, v, block_lengths=blocks)
    k[:, 45:], v[:, 45:60], v[:, 60:] = torch.nan, torch.inf, torch.nan
    after = scale_block_attention(q, k, v, block_lengths=blocks)
    assert torch.equal(before[:, :45], after[:, :45])
    assert after[:, 45:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [-torch.inf, -1e20])
def test_keys_that_score_minus_infinity(backend: str, dtype: torch.dtype, low: float) -> None:
    """First tiles of keys without weight, whose scores may overflow; rows that see no others are NaN."""
    if low > -torch.inf and dtype == torch.float16:
        pytest.skip("float16 has no 1e20")
    q, k = torch.ones(1, 200, 1, 4, dtype=dtype), torch.zeros(1, 200, 1, 4, dtype=dtype)
    v = torch.randn(1, 200, 1, 4).to(dtype)
    k[:, :130] = low
    if low > -torch.inf:
        q *= -low
    out, lse = FORWARD(q, k, v, [100, 50, 50], 1.0)
    assert out[:, :100].isnan().all() and (lse[..., :100] == -torch.inf).all()
    for first, last, end in ((100, 150, 150), (150, 200, 200)):
        expected = v[:, 130:end].double().mean(1, keepdim=True).expand(-1, last - first, -1, -1)
        close = TOLERANCES[NAMES[dtype]]._asdict()
        torch.testing.assert_close(out[:, first:last].double(), expected, **close)
        cached = CACHED(q[:, first:last], k, v, end, 1.0)
        torch.testing.assert_close(cached.double(), expected, **close)


def test_no_images(backend: str) -> None:
    q, k, v = qkv(0, 5, 2, 4, dtype=torch.float32, grad=True)
    out = scale_block_attention(q, k, v, block_lengths=[2, 3])
    assert out.shape == torch.autograd.grad(out.sum(), k)[0].shape == (0, 5, 2, 4)
    assert cached_attention(q.detach(), k.detach(), v.detach(), 2).shape == (0, 5, 2, 4)


@pytest.mark.backends("reference", "cpu")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (1, 3, 0, 4), (1, 3, 2, 0)], ids=str)
def test_nothing_to_do(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    out = scale_block_attention(x, x, x, block_lengths=[2, 1], softmax_scale=1.0)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.shape == grad.shape == shape
    with torch.no_grad():
        assert cached_attention(x, x, x, 3, softmax_scale=1.0).shape == shape


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_read_any_strides(backend: str, dtype: torch.dtype) -> None:
    fused = torch.randn(2, 90, 3, 2, 24, dtype=dtype)
    q, k, v = fused.unbind(2)
    spread = k.mT.contiguous().mT
    assert spread.stride(-1) != 1
    expected = scale_block_attention(*(t.contiguous() for t in (q, k, v)), block_lengths=[50, 40])
    assert torch.equal(scale_block_attention(q, spread, v, block_lengths=[50, 40]), expected)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_with_a_cache(backend: str, dtype: torch.dtype) -> None:
    blocks = [70, 1, 33, 150]
    T = sum(blocks)
    q, k, v = qkv(2, T, 3, 16, dtype=dtype)
    k_cache, v_cache = (torch.full((2, T + 9, 3, 16), torch.nan, dtype=dtype) for _ in range(2))
    whole = scale_block_attention(q, k, v, block_lengths=blocks)
    for length, end in zip(blocks, accumulate(blocks), strict=True):
        rows = slice(end - length, end)
        k_cache[:, rows], v_cache[:, rows] = k[:, rows], v[:, rows]
        assert torch.equal(cached_attention(q[:, rows], k_cache, v_cache, end), whole[:, rows])


def test_an_instruction_set_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CPU_ISA", "neon")
    built = extension.unavailable() is None
    error, message = (ValueError, "HITSR_FAST_CPU_ISA") if built else (RuntimeError, "not built")
    with use_backend("cpu"), pytest.raises(error, match=message):
        scale_block_attention(*qkv(1, 5, 2, 4, dtype=torch.float32), block_lengths=[5])


@pytest.mark.filterwarnings("ignore:hitsr_fast._C:RuntimeWarning")
def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HITSR_FAST_CPU_ISA", raising=False)
    monkeypatch.setattr("hitsr_fast.extension.unavailable", lambda module="_C": "not built")
    q, k, v = qkv(1, 50, 2, 8, dtype=torch.float32)
    with use_backend("cpu"):
        out = scale_block_attention(q, k, v, block_lengths=[20, 30])
        first = cached_attention(q[:, :20], k, v, 20)
    tolerance = TOLERANCES["float32_reordered"]._asdict()
    torch.testing.assert_close(out.double(), dense(q, k, v, [20, 30]), **tolerance)
    torch.testing.assert_close(first, out[:, :20], **tolerance)


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


def test_a_cache_compiles_for_any_length() -> None:
    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int) -> Tensor:
        k_cache[:, length - 3 : length] = q.cos()
        return cached_attention(q, k_cache, v_cache, length) + 1

    q, k, v = (t[:, :n] for t, n in zip(qkv(1, 9, 2, 4), (3, 9, 9), strict=True))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for length in (4, 7, 9):  # from the second on, length is dynamic
        expected = step(q, k.clone(), v, length)
        assert torch.equal(compiled(q, k, v, length), expected)
        assert torch.equal(k[:, length - 3 : length], q.cos())


# --- Triton's plans


@pytest.mark.backends("triton")
def test_the_same_each_time(backend: str) -> None:
    def once() -> tuple[Tensor, ...]:
        out, lse = FORWARD(q, k, v, blocks, 0.3)
        cached = CACHED(q[:, :5], k, v, 150, 0.3)
        return out, lse, *BACKWARD(out, q, k, v, out, lse, blocks, 0.3), cached

    blocks = [40, 3, 64, 43]
    q, k, v = qkv(1, 150, 1, 8, dtype=torch.float32)
    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.backends("triton")
def test_enough_programs_split_nothing(backend: str) -> None:
    q, k, v = qkv(1, 150, 128, 2, dtype=torch.float32)
    share, _ = triton.decode_plan(1, 3, 128, 2, 150, torch.float32)
    assert share >= 150
    expected = dense(q, k, v, [147, 3])[:, 147:].float()
    out = cached_attention(q[:, 147:], k, v, 150)
    torch.testing.assert_close(out, expected, **TOLERANCES["float32_reordered"]._asdict())


def test_what_triton_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(1, 2, 3, 4)

    def reason(q: Tensor, softmax_scale: float = 1.0) -> str | None:
        return refusal("scale_block_attention", "triton", q, q, q, [2], softmax_scale)

    assert reason(q) == "needs CUDA or HIP tensors, found q on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason(q) is None
    assert reason(q.bfloat16()) == "needs a GPU for bfloat16, found Triton's interpreter"
    assert reason(torch.zeros(1, 1, 1, 129)) == "needs D of at most 128, found 129"
    assert reason(torch.zeros(65536, 1, 1, 1)) == "needs B of at most 65535, found 65536"
    assert reason(torch.zeros(1, 1, 65536, 1)) == "needs NH of at most 65535, found 65536"
    for scale in (0.0, -1.0):
        assert reason(q, scale) == f"needs a softmax_scale above 0, found {scale}"


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
