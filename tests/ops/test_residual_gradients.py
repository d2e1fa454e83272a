"""Gradients of the residual quantizer, its fakes, and that it compiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

from hitsr_fast.ops import (
    phi_table,
    prepare_codebook,
    residual_decode,
    residual_quantize,
    residual_step,
)
from tests.ops.residual_quantizer import Bank, bank, encode_arguments, problems
from tests.tolerances import TOLERANCES

OPS = torch.ops.hitsr_fast


def decoded(indices: Tensor, codes: Bank, problem: dict[str, Any]) -> Tensor:
    """`(S, B, C, H, W)`, the reconstruction after each scale, by PyTorch's own differentiable functions."""
    maps, start, r = [], 0, problem["phi_ratio"]
    total = torch.zeros((), dtype=codes.codebook.dtype)
    for (h, w), phi in zip(problem["scales"], problem["phi_index"], strict=True):
        code_map = codes.codebook[indices[:, start : start + h * w]].transpose(1, 2).unflatten(2, (h, w))
        up = F.interpolate(code_map, size=problem["size"], mode="bicubic")
        total = total + (1 - r) * up + r * F.conv2d(up, codes.phi_weight[phi], codes.phi_bias[phi], padding=1)
        maps.append(total)
        start += h * w
    return torch.stack(maps)


@pytest.mark.parametrize("asked", ["the last", "each", "both"])
@given(problem=problems())
def test_gradients_equal_autograd(asked: str, problem: dict[str, Any]) -> None:
    z, codes = torch.randn(2, 3, *problem["size"], dtype=torch.float64), bank(grad=True)
    out = residual_quantize(z, *codes, **encode_arguments(problem), per_scale=asked != "the last")
    again = residual_decode(out.indices, *codes, **problem, per_scale=asked != "the last")
    maps = decoded(out.indices, codes, problem)
    last, each = torch.randn_like(maps[-1]), torch.randn_like(maps)
    if asked == "the last":
        each.zero_()
    elif asked == "each":
        last.zero_()
    expected = torch.autograd.grad((maps * each).sum() + (maps[-1] * last).sum(), codes)
    for result in (out, again):
        total = torch.zeros((), dtype=torch.float64)
        if asked != "each":
            total = total + (result.reconstruction * last).sum()
        if result.reconstructions is not None:
            total = total + (result.reconstructions * each).sum()
        for actual, want in zip(torch.autograd.grad(total, codes), expected, strict=True):
            torch.testing.assert_close(actual, want, **TOLERANCES["float64_reordered"]._asdict())


@pytest.mark.parametrize("per_scale", [False, True])
def test_gradcheck_of_decode(per_scale: bool) -> None:
    indices = torch.randint(0, 9, (1, 1 + 4 + 12))

    def maps(*codes: Tensor) -> tuple[Tensor, ...]:
        out = residual_decode(
            indices, *codes, scales=[1, 2, (3, 4)], phi_index=[0, 1, 0], size=(3, 4), per_scale=per_scale
        )
        return (out.reconstruction,) if out.reconstructions is None else (*out[:1], out.reconstructions)

    assert torch.autograd.gradcheck(maps, tuple(bank(C=2, grad=True)), **TOLERANCES["gradcheck"]._asdict())


def test_phi_is_shared_by_scales_without_gradients_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair of convolution gradients for each phi; with gradients per scale one for each scale."""
    import hitsr_fast.reference.residual_quantize as reference

    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return torch.nn.grad.conv2d_input(*args, **kwargs)

    monkeypatch.setattr(reference, "conv2d_input", counted)
    codes, indices = bank(P=4, grad=True), torch.randint(0, 9, (1, 10))
    out = residual_decode(indices, *codes, scales=[1] * 10, phi_index=phi_table(10), size=3, per_scale=True)
    assert out.reconstructions is not None
    torch.autograd.grad(out.reconstruction.sum(), codes, retain_graph=True)
    assert len(calls) == 4
    torch.autograd.grad(out.reconstructions.sum(), codes)
    assert len(calls) == 4 + 10


def test_second_derivatives_are_refused() -> None:
    codes = bank(grad=True)
    out = residual_decode(
        torch.zeros(1, 1, dtype=torch.int64), *codes, scales=[1], phi_index=[0], size=(2, 2)
    )
    (grad,) = torch.autograd.grad(out.reconstruction.square().sum(), codes.codebook, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        grad.sum().backward()


def test_what_has_no_gradient() -> None:
    z, codes = torch.randn(1, 3, 2, 2, requires_grad=True), bank(dtype=torch.float32, grad=True)
    out = residual_quantize(z, *codes, scales=[1, 2], phi_index=[0, 0], inputs=True, per_scale=True)
    assert out.inputs is not None and out.reconstructions is not None
    assert not out.indices.requires_grad and not out.inputs.requires_grad
    for result in (out.reconstruction, out.reconstructions):
        assert torch.autograd.grad(result.sum(), z, allow_unused=True, retain_graph=True) == (None,)


def test_the_step_refuses_to_lose_a_gradient() -> None:
    codes = bank(dtype=torch.float32, grad=True)
    arguments = (
        torch.zeros(1, 3, 2, 2),
        torch.zeros(1, 1, dtype=torch.int64),
        codes.codebook,
        codes.phi_weight[0],
    )
    with pytest.raises(RuntimeError, match=r"has no gradient; call it under torch.no_grad\(\)"):
        residual_step(*arguments, codes.phi_bias[0], scale=1, next_scale=None)
    with torch.no_grad():
        residual_step(*arguments, codes.phi_bias[0], scale=1, next_scale=None)


def test_opcheck() -> None:
    codes = bank(dtype=torch.float32, grad=True)
    z, layout = torch.randn(2, 3, 4, 5), ([1, 1, 2, 3, 4, 5], [0, 1, 1])
    encode = OPS.residual_quantize.default
    torch.library.opcheck(encode, (z, *codes, [], "", *layout, 0.5, None, "l2", False, False))
    torch.library.opcheck(encode, (z, *codes, [], "", *layout, 0.5, None, "l2", True, True))
    prepared = prepare_codebook(codes.codebook)
    packed = (list(prepared.parts), prepared.layout)
    torch.library.opcheck(encode, (z, *codes, *packed, *layout, 0.5, None, "l2", False, True))

    grad_codes, codes = codes, codes.to(torch.float32)
    _, indices, _, maps = OPS.residual_quantize(z, *codes, *packed, *layout, 0.5, None, "l2", False, True)
    replayed = (z.half(), *codes, [], "", *layout, 0.5, indices[:, :1], "cosine", True, False)
    torch.library.opcheck(encode, replayed)
    for grads in (maps, maps[:0]):
        backward = (maps[-1], grads, indices, *codes[:2], *layout, 0.5)
        torch.library.opcheck(OPS.residual_decode_backward.default, backward)
    for asked in ((False, False), (True, True)):
        torch.library.opcheck(
            OPS.residual_decode.default, (indices, *grad_codes, *layout, [4, 5], 0.5, *asked)
        )


def test_opcheck_of_the_step() -> None:
    codes = bank(dtype=torch.float32)
    phi = codes.codebook, codes.phi_weight[0], codes.phi_bias[0]
    for following in ([3, 4], [4, 5], [0, 0]):
        arguments = (
            torch.randn(2, 3, 4, 5),
            torch.zeros(2, 6, dtype=torch.int64),
            *phi,
            [2, 3],
            following,
            0.5,
        )
        torch.library.opcheck(OPS.residual_step.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    def forward(z: Tensor, *codes: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        arguments: dict[str, Any] = {"scales": [1, 2], "phi_index": [0, 1], "inputs": True, "per_scale": True}
        out = residual_quantize(z.sin(), *codes, **arguments)
        again = residual_decode(out.indices, *codes, **arguments, size=z.shape[2:])
        assert out.reconstructions is not None
        return out.indices, again.inputs, (out.reconstructions * again.reconstruction).sum()

    z, codes = torch.randn(1, 3, 2, 2, dtype=torch.float64), bank(grad=True)
    indices, inputs, loss = torch.compile(forward, fullgraph=True, backend="aot_eager")(z, *codes)
    expected_indices, expected_inputs, expected = forward(z, *codes)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(inputs, expected_inputs, **TOLERANCES["float64_reordered"]._asdict())
    torch.testing.assert_close(loss, expected, **TOLERANCES["float64_reordered"]._asdict())
    for actual, want in zip(
        torch.autograd.grad(loss, codes), torch.autograd.grad(expected, codes), strict=True
    ):
        torch.testing.assert_close(actual, want, **TOLERANCES["float64_reordered"]._asdict())


def test_compiles_with_a_prepared_codebook() -> None:
    z, codes = torch.randn(1, 3, 2, 2), bank(dtype=torch.float32)
    prepared = prepare_codebook(codes.codebook)

    def forward(z: Tensor) -> Tensor:
        return residual_quantize(z, *codes, scales=[1, 2], phi_index=[0, 1], prepared=prepared).indices

    assert torch.equal(torch.compile(forward, fullgraph=True, backend="aot_eager")(z), forward(z))


def test_the_step_compiles_without_a_graph_break() -> None:
    codes = bank(dtype=torch.float32)

    def step(reconstruction: Tensor, indices: Tensor) -> Tensor:
        phi = codes.codebook, codes.phi_weight[0], codes.phi_bias[0]
        return residual_step(reconstruction, indices, *phi, scale=1, next_scale=2) + reconstruction

    reconstruction, copy = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    indices = torch.ones(1, 1, dtype=torch.int64)
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(reconstruction, indices)
    assert torch.equal(out, step(copy, indices))
    assert torch.equal(reconstruction, copy)
