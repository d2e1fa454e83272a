"""Layers that keep little for the backward pass have the values and gradients of the plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.dispatch import use_backend
from hitsr_fast.nn.recompute import gated_linear, linear_of, qkv_attention
from hitsr_fast.ops.scale_block_attention import scale_block_attention
from tests.tolerances import TOLERANCES

_LENGTHS = [5, 4]
_HEADS = 2


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _leaves(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def _with_gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def _plain_attention(qkv: Tensor, factor: Tensor) -> Tensor:
    q, k, v = qkv.unflatten(2, (3, _HEADS, -1)).unbind(2)
    q, k = F.normalize(q, dim=-1) * factor[:, None], F.normalize(k, dim=-1)
    return scale_block_attention(q.to(v.dtype), k, v, block_lengths=_LENGTHS, softmax_scale=1.0).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_linear_of_an_activation(dtype: torch.dtype) -> None:
    leaves = _leaves((2, 3, 6), (4, 6), (4,), dtype=dtype)
    x, weight, bias = leaves
    found = _with_gradients(linear_of(_gelu, (x,), weight, bias), leaves)
    torch.testing.assert_close(found, _with_gradients(F.linear(_gelu(x), weight, bias), leaves))


@pytest.mark.parametrize("images", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gated_branch(dtype: torch.dtype, images: int) -> None:
    leaves = _leaves((images, 5, 6), (4, 6), (4,), (images, 5, 4), (images, 4), dtype=dtype)
    hidden, weight, bias, x, gate = leaves
    ours = gated_linear(x, gate, _gelu, (hidden,), weight, bias)
    plain = x + gate[:, None] * F.linear(_gelu(hidden), weight, bias)
    torch.testing.assert_close(_with_gradients(ours, leaves), _with_gradients(plain, leaves))


def test_a_gated_branch_under_autocast() -> None:
    leaves = _leaves((3, 5, 6), (4, 6), (4,), (3, 5, 4), (3, 4), dtype=torch.float32)
    hidden, weight, bias, x, gate = leaves
    with torch.autocast("cpu", torch.bfloat16):
        ours = gated_linear(x, gate, _gelu, (hidden,), weight, bias)
        plain = x + gate[:, None] * F.linear(_gelu(hidden), weight, bias)
    assert ours.dtype == torch.float32
    found, expected = _with_gradients(ours, leaves), _with_gradients(plain.float(), leaves)
    torch.testing.assert_close(found, expected, **TOLERANCES["bfloat16"]._asdict())


def test_a_small_gate_keeps_gradients_finite_in_float16() -> None:
    leaves = _leaves((3, 40, 6), (4, 6), (4,), (3, 40, 4), (3, 4), dtype=torch.float32)
    hidden, weight, bias, x, gate = leaves
    with torch.autocast("cpu", torch.float16):
        out = gated_linear(x, gate * 1e-3, _gelu, (hidden,), weight, bias)
    grads = torch.autograd.grad(out.float().sum() * 3e4, [weight, bias, hidden])
    assert all(grad.isfinite().all() for grad in grads)


def test_what_wants_no_gradient_has_none() -> None:
    hidden, weight, bias, x, gate = _leaves((2, 5, 6), (4, 6), (4,), (2, 5, 4), (2, 4), dtype=torch.float64)
    out = gated_linear(x.detach(), gate, _gelu, (hidden.detach(),), weight, bias)
    (found,) = torch.autograd.grad(out.sum(), [gate])
    torch.testing.assert_close(found, F.linear(_gelu(hidden), weight, bias).sum(1))


def test_by_the_reference_backend_pytorch_keeps_what_it_likes() -> None:
    leaves = _leaves((2, 5, 6), (4, 6), (4,), (2, 5, 4), (2, 4), dtype=torch.float32)
    hidden, weight, bias, x, gate = leaves

    def kept(backend: str | None) -> int:
        numbers: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            numbers.append(tensor.numel())
            return tensor

        with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gated_linear(x, gate, _gelu, (hidden,), weight, bias)
        return sum(numbers)

    shared = weight.numel() + gate.numel() + hidden.numel()
    assert kept(None) == shared + bias.numel()
    assert kept("reference") == shared + hidden.numel() + x.numel()  # the GELU and the branch


def test_a_linear_under_autocast() -> None:
    leaves = _leaves((2, 3, 6), (4, 6), (4,), dtype=torch.float32)
    x, weight, bias = leaves
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = linear_of(_gelu, (x,), weight, bias), F.linear(_gelu(x), weight, bias)
    assert ours.dtype == torch.bfloat16
    found, expected = _with_gradients(ours, leaves), _with_gradients(plain, leaves)
    torch.testing.assert_close(found, expected, **TOLERANCES["bfloat16"]._asdict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_of_normalised_queries(dtype: torch.dtype) -> None:
    (qkv,) = _leaves((2, 9, 3 * _HEADS * 8), dtype=dtype)
    factor = torch.tensor([2.0, 3.0]).requires_grad_()
    ours = qkv_attention(qkv, factor, heads=_HEADS, block_lengths=_LENGTHS, softmax_scale=1.0)
    found = [t.double() for t in _with_gradients(ours, [qkv, factor])]
    expected = [t.double() for t in _with_gradients(_plain_attention(qkv, factor), [qkv, factor])]
    torch.testing.assert_close(found, expected, **TOLERANCES["float32_reordered"]._asdict())
