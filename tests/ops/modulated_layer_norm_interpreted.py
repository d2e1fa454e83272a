"""The Triton backend of `modulated_layer_norm` on Triton's interpreter.

test_modulated_layer_norm_triton.py runs this file.

Triton asks for its interpreter once, as kernels are defined: hence a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import gated_residual, modulated_layer_norm
from tests.ops.test_modulated_layer_norm import CASES, NAMES, OPS, Case, check, norm_inputs, plain_norm
from tests.tolerances import TOLERANCES


@pytest.fixture(scope="module", autouse=True)
def _backend() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("case", CASES, ids=["norm", "residual"])
@pytest.mark.parametrize("dtype", NAMES)
def test_equals_pytorch(case: Case, dtype: torch.dtype) -> None:
    for size in [(1, 1, 1), (2, 3, 5), (1, 33, 16), (2, 18, 100), (2, 2, 1024)]:
        check(case, case[2](*size, dtype), NAMES[dtype])


@pytest.mark.parametrize("case", CASES, ids=["norm", "residual"])
def test_strides_and_mixed_dtypes(case: Case) -> None:
    wide = case[2](2, 5, 12)
    check(case, [t.detach().mT.contiguous().mT.requires_grad_() for t in wide], "float32_reordered")
    mixed = [wide[0], *(t.detach().bfloat16().requires_grad_() for t in wide[1:])]
    check(case, mixed, "bfloat16")


@pytest.mark.parametrize("out_dtype", NAMES)
@pytest.mark.parametrize("dtype", NAMES)
def test_dtype_of_the_result(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    inputs = norm_inputs(2, 5, 40, dtype)
    out = modulated_layer_norm(*inputs, out_dtype=out_dtype)
    expected = modulated_layer_norm(*(t.float() for t in inputs))
    assert out.dtype == out_dtype
    torch.testing.assert_close(out.float(), expected, **TOLERANCES[NAMES[out_dtype]]._asdict())
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in grads)


def test_eps_is_inside_the_root() -> None:
    inputs = norm_inputs(2, 3, 16)
    out = modulated_layer_norm(*inputs, eps=0.5)
    expected = plain_norm(*(t.double() for t in inputs), eps=0.5)
    grads, expected_grads = (torch.autograd.grad(t.square().sum(), inputs) for t in (out, expected))
    for actual, want in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(
            actual.double(), want.double(), **TOLERANCES["float32_reordered"]._asdict()
        )


def test_no_rows() -> None:
    x, scale, shift = norm_inputs(2, 0, 4)
    out = gated_residual(x, modulated_layer_norm(x, scale, shift), scale)
    (grad,) = torch.autograd.grad(out.sum(), scale)
    assert out.shape == (2, 0, 4) and not grad.any()


def test_opcheck() -> None:
    x, scale, shift = norm_inputs(2, 3, 8)
    torch.library.opcheck(OPS.modulated_layer_norm.default, (x, scale, shift, 1e-6, torch.bfloat16))
    torch.library.opcheck(OPS.gated_residual.default, (x, x.detach().sin(), scale))
