"""`modulated_layer_norm` and `gated_residual` on each backend against PyTorch's own, in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.ops import gated_residual, gated_residual_norm, modulated_layer_norm
from hitsr_fast.reference import modulated_layer_norm as reference
from tests.ops.backends import refusal, sizes
from tests.tolerances import TOLERANCES

NAMES = {torch.float32: "float32_reordered", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SIZES = {
    "any": [(1, 1, 1), (2, 3, 5), (1, 33, 16), (3, 70, 100), (2, 2, 1024)],
    "interpreted": [(1, 1, 1), (2, 3, 5), (1, 33, 16), (2, 18, 100), (2, 2, 1024)],
    "gpu": [(1, 1, 1), (3, 70, 100), (2, 1024, 1024), (1, 7, 8192)],
}


def plain_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    scale, shift = (t.view(x.shape[0], 1, x.shape[2]) for t in (scale, shift))
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def plain_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate.view(x.shape[0], 1, x.shape[2]) * y


def norm_inputs(B: int, L: int, C: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = torch.randn(B, L, C) * 2 + 0.5
    return [t.to(dtype).requires_grad_() for t in (x, torch.randn(B, C), torch.randn(B, C))]


def residual_inputs(B: int, L: int, C: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(B, L, C), (B, L, C), (B, C)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


CASES = [(modulated_layer_norm, plain_norm, norm_inputs), (gated_residual, plain_residual, residual_inputs)]
Case = tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., list[Tensor]]]


def check(case: Case, inputs: list[Tensor], tolerance: str) -> None:
    """Result and gradients against PyTorch's formula in float64, relative to the largest value of each."""
    op, plain, _ = case
    out, expected = op(*inputs), plain(*(t.double() for t in inputs))
    weight = torch.randn(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, inputs, weight)
    expected_grads = torch.autograd.grad(expected, inputs, weight.double())
    assert out.dtype == inputs[0].dtype and out.is_contiguous()
    for actual, want in zip((out, *grads), (expected, *expected_grads), strict=True):
        size = want.double().abs().max().clamp(min=1)
        torch.testing.assert_close(
            actual.double() / size, want.double() / size, **TOLERANCES[tolerance]._asdict()
        )


@pytest.mark.parametrize("case", CASES, ids=["norm", "residual"])
@pytest.mark.parametrize("dtype", NAMES)
def test_equals_pytorch(backend: str, case: Case, dtype: torch.dtype) -> None:
    for size in sizes(backend, SIZES):
        check(case, case[2](*size, dtype), NAMES[dtype])


@pytest.mark.parametrize("case", CASES, ids=["norm", "residual"])
def test_strides_and_mixed_dtypes(backend: str, case: Case) -> None:
    """As a model has them: modulations are slices of one row, and 16-bit ones meet a float32 stream."""
    make = case[2]
    wide = make(2, 5, 12)
    views = [t.detach().mT.contiguous().mT.requires_grad_() if t.dim() == 3 else t for t in wide]
    check(case, views, "float32_reordered")
    parts = torch.randn(2, 1, 3 * 12).chunk(3, dim=-1)
    leaves = [p.detach().requires_grad_() for p in parts]
    assert not leaves[1].is_contiguous()
    check(
        case, [t if t.dim() == 3 else leaf for t, leaf in zip(wide, leaves, strict=True)], "float32_reordered"
    )
    mixed = [wide[0], *(t.detach().bfloat16().requires_grad_() for t in wide[1:])]
    check(case, mixed, "bfloat16")
    check(case, [mixed[1], wide[0], mixed[2]] if case[0] is gated_residual else mixed, "bfloat16")


@pytest.mark.parametrize("out_dtype", NAMES)
@pytest.mark.parametrize("dtype", NAMES)
def test_dtype_of_the_result(backend: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """As the branch wants it that reads the result."""
    inputs = norm_inputs(2, 5, 40, dtype)
    out = modulated_layer_norm(*inputs, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    wide = [t.detach().float().requires_grad_() for t in inputs]
    expected = modulated_layer_norm(*wide)
    torch.testing.assert_close(out.float(), expected, **TOLERANCES[NAMES[out_dtype]]._asdict())
    weight = torch.randn(out.shape).to(out_dtype)
    grads = torch.autograd.grad(out, inputs, weight)
    expected_grads = torch.autograd.grad(expected, wide, weight.float())
    for actual, want in zip(grads, expected_grads, strict=True):
        size = want.abs().max()
        assert actual.dtype == dtype
        torch.testing.assert_close(
            actual.float() / size, want.float() / size, **TOLERANCES[NAMES[dtype]]._asdict()
        )


@pytest.mark.parametrize("out_dtype", NAMES)
@pytest.mark.parametrize("branch", NAMES)
@pytest.mark.parametrize("dtype", NAMES)
def test_both_in_a_row_are_the_two_bit_for_bit(
    backend: str, dtype: torch.dtype, branch: torch.dtype, out_dtype: torch.dtype
) -> None:
    for B, L, C in sizes(
        backend, {"any": ((2, 5, 40), (1, 33, 16), (1, 2, 1000)), "interpreted": ((2, 3, 40),)}
    ):
        x, y, gate = (t.detach() for t in residual_inputs(B, L, C, dtype))
        scale, shift = torch.randn(B, 2 * C).chunk(2, dim=1)
        y = y.to(branch).mT.contiguous().mT
        total, normed = gated_residual_norm(x, y, gate, scale, shift, eps=0.1, out_dtype=out_dtype)
        expected = gated_residual(x, y, gate)
        assert torch.equal(total, expected) and total.is_contiguous()
        assert torch.equal(normed, modulated_layer_norm(expected, scale, shift, eps=0.1, out_dtype=out_dtype))


@pytest.mark.backends("reference")
def test_float64_results(backend: str) -> None:
    x, scale, shift = (t.detach() for t in norm_inputs(2, 5, 40))
    out = modulated_layer_norm(x, scale, shift, out_dtype=torch.float64)
    assert torch.equal(out, reference.modulated_layer_norm(x, scale, shift, 1e-6, torch.float32)[0].double())


@pytest.mark.parametrize("case", CASES, ids=["norm", "residual"])
def test_gradcheck(case: Case) -> None:
    inputs = [t.detach().double().requires_grad_() for t in case[2](2, 3, 4)]
    assert torch.autograd.gradcheck(case[0], inputs, **TOLERANCES["gradcheck"]._asdict())


@given(B=st.integers(1, 3), L=st.integers(0, 40), C=st.integers(2, 70), eps=st.sampled_from([1e-6, 0.5]))
def test_a_mean_that_is_large_beside_the_deviation(backend: str, B: int, L: int, C: int, eps: float) -> None:
    signs = 1.0 - 2 * (torch.arange(C) % 2)
    x = 100 + signs * (1 + torch.rand(B, L, C))
    scale, shift = torch.randn(B, C), torch.randn(B, C)
    found = modulated_layer_norm(x, scale, shift, eps=eps)
    expected = plain_norm(*(t.double() for t in (x, scale, shift)), eps)
    torch.testing.assert_close(found.double(), expected, **TOLERANCES["mean_of_100"]._asdict())


@pytest.mark.backends("reference", "cpu")  # Triton's rows are at most 8192 long
def test_long_rows_keep_the_deviation(backend: str) -> None:
    """Whole sixteenths around 10,000, which float32 holds: the input has no rounding of its own."""
    x = 1e4 + torch.randint(-16, 17, (1, 2, 2**16)) / 16
    zeros = torch.zeros(1, 2**16)
    expected = plain_norm(*(t.double() for t in (x, zeros, zeros)))
    found = modulated_layer_norm(x, zeros, zeros)
    torch.testing.assert_close(found.double(), expected, **TOLERANCES["mean_of_100"]._asdict())


def test_eps_is_inside_the_root(backend: str) -> None:
    inputs = norm_inputs(2, 3, 16)
    out = modulated_layer_norm(*inputs, eps=0.5)
    expected = plain_norm(*(t.double() for t in inputs), eps=0.5)
    grads, expected_grads = (torch.autograd.grad(t.square().sum(), inputs) for t in (out, expected))
    for actual, want in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(
            actual.double(), want.double(), **TOLERANCES["float32_reordered"]._asdict()
        )


def test_no_rows(backend: str) -> None:
    x, scale, shift = norm_inputs(2, 0, 4)
    out = gated_residual(x, modulated_layer_norm(x, scale, shift), scale)
    (grad,) = torch.autograd.grad(out.sum(), scale)
    assert out.shape == (2, 0, 4) and not grad.any()


def test_each_gradient_has_the_precision_of_its_own_argument(backend: str) -> None:
    x, scale = torch.randn(2, 256, 8), torch.zeros(2, 8, dtype=torch.float16, requires_grad=True)
    shift = torch.zeros(2, 8, requires_grad=True)
    modulated_layer_norm(x, scale, shift).backward(torch.full_like(x, 400.0))
    assert shift.grad is not None and shift.grad.dtype == torch.float32
    assert (shift.grad == 400 * 256).all(), "more than float16 holds"


def test_a_bad_row_disturbs_no_other(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, scale, shift = (t.detach() for t in norm_inputs(1, 4, 40, dtype))
        x[0, 1, 3], x[0, 2, 0] = torch.nan, torch.inf
        out = modulated_layer_norm(x, scale, shift)
        assert out[0, 1:3].isnan().all() and out[0, [0, 3]].isfinite().all()
        assert gated_residual(x, x, scale).isfinite().sum() == 4 * 40 - 2


def test_bad_arguments() -> None:
    x, row = torch.zeros(2, 3, 4), torch.zeros(2, 4)
    with pytest.raises(TypeError, match="x: expected dtype"):
        modulated_layer_norm(x.int(), row, row)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, L, C\), found \(2, 4\)"):
        modulated_layer_norm(row, row, row)
    with pytest.raises(ValueError, match=r"x: expected C of at least 1, found shape \(2, 3, 0\)"):
        modulated_layer_norm(x[..., :0], row, row)
    for wrong in (row[:1], row[:, :3], x, row[0]):
        with pytest.raises(ValueError, match=r"scale: expected shape \(B=2, C=4\) or \(B=2, 1, C=4\), found"):
            modulated_layer_norm(x, wrong, row)
    with pytest.raises(TypeError, match="shift: expected dtype"):
        modulated_layer_norm(x, row, row.bool())
    for eps in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"eps: expected a finite number above 0, found {eps}"):
            modulated_layer_norm(x, row, row, eps=eps)
    with pytest.raises(TypeError, match=r"out_dtype: expected float16 or .* float64, found int32"):
        modulated_layer_norm(x, row, row, out_dtype=torch.int32)
    with pytest.raises(ValueError, match=r"y: expected shape \(B=2, L=3, C=4\), found \(2, 2, 4\)"):
        gated_residual(x, x[:, 1:], row)
    with pytest.raises(ValueError, match=r"gate: expected shape \(B=2, C=4\)"):
        gated_residual(x, x, row[:, :1])
    both = {"x": x, "y": x, "gate": row, "scale": row, "shift": row}
    for name, wrong, message in (
        ("x", row, r"x: expected shape \(B, L, C\)"),
        ("x", x[..., :0], "x: expected C of at least 1"),
        ("y", x[:, 1:], r"y: expected shape \(B=2, L=3, C=4\)"),
        ("gate", x, r"gate: expected shape \(B=2, C=4\)"),
        ("scale", row[:1], r"scale: expected shape \(B=2, C=4\)"),
        ("shift", row[0], r"shift: expected shape \(B=2, C=4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_residual_norm(**(both | {name: wrong}))
    with pytest.raises(ValueError, match="eps: expected a finite number above 0, found 0"):
        gated_residual_norm(**both, eps=0.0)
    with pytest.raises(TypeError, match="out_dtype: expected float16"):
        gated_residual_norm(**both, out_dtype=torch.int32)


def test_what_triton_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    x, row = torch.zeros(1, 2, 3), torch.zeros(1, 3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    supports = functools.partial(refusal, "gated_residual", "triton")
    assert supports(x, x, row) == "needs CUDA or HIP tensors, found x on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert supports(x, x, row) is None
    assert supports(torch.zeros(1, 1, 8193), x, row) == "needs C of at most 8192, found 8193"
    assert supports(torch.zeros(65536, 1, 1), x, row) == "needs B of at most 65535, found 65536"
    reason = refusal("modulated_layer_norm", "triton", x, row, row, 1e-6, torch.float64)
    assert reason == "needs float16, bfloat16 or float32, found out_dtype of float64"
