"""`residual_quantize`, `residual_decode` and `residual_step` against a literal version of the algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import (
    Metric,
    nearest_code,
    phi_table,
    residual_decode,
    residual_quantize,
    residual_step,
)
from tests.tolerances import TOLERANCES

OPS = torch.ops.hitsr_fast


class Bank(NamedTuple):
    codebook: Tensor
    phi_weight: Tensor
    phi_bias: Tensor


def bank(K: int = 9, C: int = 3, P: int = 2, dtype: torch.dtype = torch.float64, grad: bool = False) -> Bank:
    shapes = ((K, C), (P, C, C, 3, 3), (P, C))
    return Bank(*(torch.randn(shape, dtype=dtype).mul_(0.5).requires_grad_(grad) for shape in shapes))


def plain(
    z: Tensor, codes: Bank, scales: Sequence[tuple[int, int]], phi_index: Sequence[int], ratio: float
) -> tuple[Tensor, Tensor]:
    """The algorithm as VAR writes it: no shortcut where sizes match, differentiable by autograd."""
    residual, reconstruction, indices = z.detach().clone(), torch.zeros_like(z), []
    for (h, w), phi in zip(scales, phi_index, strict=True):
        pooled = F.interpolate(residual, size=(h, w), mode="area").permute(0, 2, 3, 1)
        index = (pooled[..., None, :] - codes.codebook.detach()).square().sum(-1).argmin(-1)
        up = F.interpolate(codes.codebook[index].permute(0, 3, 1, 2), size=z.shape[2:], mode="bicubic")
        through = F.conv2d(up, codes.phi_weight[phi], codes.phi_bias[phi], padding=1)
        step = (1 - ratio) * up + ratio * through
        reconstruction = reconstruction + step
        residual = residual - step.detach()
        indices.append(index.flatten(1))
    return torch.cat(indices, 1), reconstruction


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """A latent size, some scales within it (the whole size among them now and then), a phi each, a ratio."""
    H, W = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    sides = st.one_of(st.just((H, W)), st.tuples(st.integers(1, H), st.integers(1, W)))
    scales = draw(st.lists(sides, min_size=1, max_size=4))
    phi_index = [draw(st.integers(0, 1)) for _ in scales]
    return {
        "size": (H, W),
        "scales": scales,
        "phi_index": phi_index,
        "phi_ratio": draw(st.sampled_from([0.0, 0.5, 1.0])),
    }


def quantize_arguments(problem: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in problem.items() if name != "size"}


@given(problem=problems())
def test_equals_the_plain_algorithm(problem: dict[str, Any]) -> None:
    z, codes = torch.randn(2, 3, *problem["size"], dtype=torch.float64), bank()
    out = residual_quantize(z, *codes, **quantize_arguments(problem))
    indices, expected = plain(z, codes, problem["scales"], problem["phi_index"], problem["phi_ratio"])
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.reconstruction, expected, **TOLERANCES["float64_reordered"]._asdict())


@given(problem=problems())
def test_decode_equals_the_reconstruction_bit_for_bit(problem: dict[str, Any]) -> None:
    z, codes = torch.randn(2, 3, *problem["size"]), bank(dtype=torch.float32)
    out = residual_quantize(z, *codes, **quantize_arguments(problem))
    assert torch.equal(residual_decode(out.indices, *codes, **problem), out.reconstruction)


@given(problem=problems())
def test_steps_equal_decode_bit_for_bit(problem: dict[str, Any]) -> None:
    codes, size, scales = bank(dtype=torch.float32), problem["size"], problem["scales"]
    indices = [torch.randint(0, 9, (2, h * w)) for h, w in scales]
    reconstruction = torch.zeros(2, 3, *size)
    for i, scale in enumerate(scales):
        following = scales[i + 1] if i + 1 < len(scales) else None
        phi = problem["phi_index"][i]
        pooled = residual_step(
            reconstruction,
            indices[i],
            codes.codebook,
            codes.phi_weight[phi],
            codes.phi_bias[phi],
            scale=scale,
            next_scale=following,
            phi_ratio=problem["phi_ratio"],
        )
        if following is None:
            assert pooled.shape == (2, 3, 0, 0)
        else:
            expected = F.interpolate(reconstruction, size=following, mode="area")
            torch.testing.assert_close(pooled, expected, **TOLERANCES["float32_reordered"]._asdict())
            assert pooled.untyped_storage().data_ptr() != reconstruction.untyped_storage().data_ptr()
    assert torch.equal(reconstruction, residual_decode(torch.cat(indices, 1), *codes, **problem))


@given(problem=problems(), metric=st.sampled_from(["l2", "cosine"]))
def test_backends_give_the_same_bits(problem: dict[str, Any], metric: Metric) -> None:
    z, codes = torch.randn(2, 3, *problem["size"]), bank(dtype=torch.float32)
    out = residual_quantize(z, *codes, **quantize_arguments(problem), metric=metric)
    with use_backend("reference"):
        expected = residual_quantize(z, *codes, **quantize_arguments(problem), metric=metric)
    assert torch.equal(out.indices, expected.indices)
    assert torch.equal(out.reconstruction, expected.reconstruction)


@given(problem=problems(), data=st.data())
def test_replay_of_own_codes_changes_nothing(problem: dict[str, Any], data: st.DataObject) -> None:
    z, codes, arguments = (
        torch.randn(2, 3, *problem["size"]),
        bank(dtype=torch.float32),
        quantize_arguments(problem),
    )
    out = residual_quantize(z, *codes, **arguments)
    count = data.draw(st.integers(0, len(problem["scales"])))
    tokens = sum(h * w for h, w in problem["scales"][:count])
    again = residual_quantize(z, *codes, **arguments, replay=out.indices[:, :tokens])
    assert torch.equal(again.indices, out.indices)
    assert torch.equal(again.reconstruction, out.reconstruction)


def test_replayed_codes_are_used_and_shape_the_rest() -> None:
    z, codes = torch.randn(2, 3, 4, 4), bank(dtype=torch.float32)
    free = residual_quantize(z, *codes, scales=[2, 4], phi_index=[0, 1])
    replay = (free.indices[:, :4] + 1) % 9
    forced = residual_quantize(z, *codes, scales=[2, 4], phi_index=[0, 1], replay=replay)
    first = residual_decode(replay, *codes, scales=[2], phi_index=[0], size=(4, 4))
    rows = (z - first).permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.equal(forced.indices[:, :4], replay)
    assert torch.equal(forced.indices[:, 4:].flatten(), nearest_code(rows, codes.codebook))


def test_an_exact_code_is_found_and_leaves_nothing() -> None:
    codes = bank(K=50, dtype=torch.float32)
    wanted = torch.randint(0, 50, (2, 20))
    z = codes.codebook[wanted].transpose(1, 2).reshape(2, 3, 4, 5)
    out = residual_quantize(z, *codes, scales=[(4, 5)], phi_index=[0], phi_ratio=0.0)
    assert torch.equal(out.indices, wanted)
    assert torch.equal(out.reconstruction, z)


def test_images_of_a_batch_are_independent() -> None:
    z, codes = torch.randn(3, 3, 6, 5), bank(dtype=torch.float32)
    z[1] = torch.nan
    out = residual_quantize(z, *codes, scales=[1, 3, (6, 5)], phi_index=[0, 1, 1])
    for image in (0, 2):
        alone = residual_quantize(z[image : image + 1], *codes, scales=[1, 3, (6, 5)], phi_index=[0, 1, 1])
        assert torch.equal(out.indices[image], alone.indices[0])
    assert out.indices[1].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_input_is_computed_in_float32(dtype: torch.dtype) -> None:
    z, codes = torch.randn(1, 3, 4, 4, dtype=dtype), bank(dtype=dtype)
    out = residual_quantize(z, *codes, scales=[2, 4], phi_index=[0, 1])
    wide = residual_quantize(z.float(), *(t.float() for t in codes), scales=[2, 4], phi_index=[0, 1])
    assert out.reconstruction.dtype == torch.float32
    assert torch.equal(out.indices, wide.indices)
    assert torch.equal(out.reconstruction, wide.reconstruction)


def test_strided_latent_is_left_alone() -> None:
    z, codes = torch.randn(2, 4, 5, 3).permute(0, 3, 1, 2), bank(dtype=torch.float32)
    before = z.clone()
    out = residual_quantize(z, *codes, scales=[2, (4, 5)], phi_index=[0, 1])
    assert torch.equal(z, before)
    assert torch.equal(
        out.indices, residual_quantize(z.contiguous(), *codes, scales=[2, (4, 5)], phi_index=[0, 1])[0]
    )


def test_cosine_metric() -> None:
    z, codes = torch.randn(1, 3, 2, 2), bank(dtype=torch.float32)
    out = residual_quantize(z, *codes, scales=[2], phi_index=[0], metric="cosine")
    assert torch.equal(out.indices[0], nearest_code(z[0].flatten(1).T, codes.codebook, metric="cosine"))


@given(problem=problems())
def test_gradients_equal_autograd_through_the_plain_algorithm(problem: dict[str, Any]) -> None:
    z, codes = torch.randn(2, 3, *problem["size"], dtype=torch.float64), bank(grad=True)
    weight = torch.randn_like(z)
    _, expected = plain(z, codes, problem["scales"], problem["phi_index"], problem["phi_ratio"])
    expected_grads = torch.autograd.grad(expected, codes, weight)
    out = residual_quantize(z, *codes, **quantize_arguments(problem))
    decoded = residual_decode(out.indices, *codes, **problem)
    for result in (out.reconstruction, decoded):
        for actual, want in zip(torch.autograd.grad(result, codes, weight), expected_grads, strict=True):
            torch.testing.assert_close(actual, want, **TOLERANCES["float64_reordered"]._asdict())


def test_gradcheck_of_decode() -> None:
    indices = torch.randint(0, 9, (1, 1 + 4 + 12))
    assert torch.autograd.gradcheck(
        lambda *codes: residual_decode(
            indices, *codes, scales=[1, 2, (3, 4)], phi_index=[0, 1, 0], size=(3, 4)
        ),
        tuple(bank(C=2, grad=True)),
        **TOLERANCES["gradcheck"]._asdict(),
    )


def test_second_derivatives_are_refused() -> None:
    codes = bank(grad=True)
    out = residual_decode(
        torch.zeros(1, 1, dtype=torch.int64), *codes, scales=[1], phi_index=[0], size=(2, 2)
    )
    (grad,) = torch.autograd.grad(out.square().sum(), codes.codebook, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        grad.sum().backward()


def test_the_latent_gets_no_gradient() -> None:
    z, codes = torch.randn(1, 3, 2, 2, requires_grad=True), bank(dtype=torch.float32, grad=True)
    out = residual_quantize(z, *codes, scales=[2], phi_index=[0])
    assert not out.indices.requires_grad
    assert torch.autograd.grad(out.reconstruction.sum(), z, allow_unused=True) == (None,)


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


@pytest.mark.parametrize(
    ("num_scales", "table"),
    [
        (1, [0]),
        (2, [0, 3]),
        (3, [0, 2, 3]),
        (4, [0, 1, 2, 3]),
        (6, [0, 0, 1, 2, 3, 3]),
        (7, [0, 0, 1, 2, 2, 3, 3]),
        (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (12, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]),
        (14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
    ],
)
def test_phi_table(num_scales: int, table: list[int]) -> None:
    assert phi_table(num_scales) == table


def test_phi_table_of_other_banks() -> None:
    assert phi_table(5, 1) == [0] * 5
    assert phi_table(4, 2) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="num_scales"):
        phi_table(0)


def quantize_with(**changes: Any) -> Any:
    codes = bank(dtype=torch.float32)._asdict()
    arguments: dict[str, Any] = {"z": torch.zeros(1, 3, 4, 4), **codes, "scales": [2, 4], "phi_index": [0, 1]}
    return residual_quantize(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"z": torch.zeros(3, 4, 4)}, ValueError, r"z: expected shape \(B, C, H, W\)"),
        ({"z": torch.zeros(1, 3, 4, 4, dtype=torch.int32)}, TypeError, "z: expected dtype"),
        ({"z": torch.zeros(1, 5, 4, 4)}, ValueError, r"codebook: expected shape \(K, C=5\), found \(9, 3\)"),
        ({"codebook": torch.zeros(0, 3)}, ValueError, "codebook: expected K and C of at least 1"),
        ({"codebook": torch.full((9, 3), torch.nan)}, ValueError, "codebook: expected finite"),
        (
            {"phi_weight": torch.zeros(2, 3, 3, 5, 5)},
            ValueError,
            r"phi_weight: expected shape \(P, 3, 3, 3, 3\)",
        ),
        (
            {"phi_weight": torch.zeros(2, 3, 3, 3, 3).double()},
            TypeError,
            "phi_weight: expected dtype float32",
        ),
        (
            {"phi_bias": torch.zeros(3, 3)},
            ValueError,
            r"phi_bias: expected shape \(P=2, C=3\), found \(3, 3\)",
        ),
        (
            {"phi_bias": torch.zeros(2, 3, device="meta")},
            ValueError,
            "phi_bias: expected device cpu, found meta",
        ),
        ({"scales": []}, ValueError, "scales: expected at least one"),
        ({"scales": [0, 4]}, ValueError, "scales: expected a side or"),
        ({"scales": [(1, 2, 3), 4]}, ValueError, "scales: expected a side or"),
        ({"scales": [2, 5]}, ValueError, r"scales: expected at most the map's \(4, 4\), found \(5, 5\)"),
        ({"phi_index": [0]}, ValueError, "phi_index: expected an entry for each of 2 scales, found 1"),
        ({"phi_index": [0, 2]}, ValueError, "phi_index: expected entries from 0 to 1"),
        ({"phi_ratio": 1.5}, ValueError, "phi_ratio: expected 0 to 1, found 1.5"),
        ({"metric": "dot"}, ValueError, "metric: expected one of"),
        ({"replay": torch.zeros(1, 4)}, TypeError, "replay: expected dtype int64"),
        ({"replay": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"replay: expected shape \(B=1, T0\)"),
        (
            {"replay": torch.zeros(1, 3, dtype=torch.int64)},
            ValueError,
            r"replay: .* one of \[0, 4, 20\], found 3",
        ),
        ({"replay": torch.full((1, 4), 9)}, ValueError, "replay: expected indices from 0 to 8, found 9 to 9"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_with(**changes)


def test_bad_arguments_of_decode_and_step() -> None:
    codes = bank(dtype=torch.float32)
    scales: dict[str, Any] = {"scales": [1, 2], "phi_index": [0, 1]}
    with pytest.raises(ValueError, match=r"indices: expected shape \(B, T0=5\), found \(1, 4\)"):
        residual_decode(torch.zeros(1, 4, dtype=torch.int64), *codes, **scales, size=(2, 2))
    with pytest.raises(ValueError, match="indices: expected indices from 0 to 8, found -1"):
        residual_decode(torch.full((1, 5), -1), *codes, **scales, size=(2, 2))
    with pytest.raises(ValueError, match="size: expected a side or"):
        residual_decode(torch.zeros(1, 5, dtype=torch.int64), *codes, **scales, size=(2, 0))
    phi = codes.codebook, codes.phi_weight[0], codes.phi_bias[0]
    one = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(TypeError, match="reconstruction: expected dtype float32, found float64"):
        residual_step(torch.zeros(1, 3, 2, 2).double(), one, *phi, scale=1, next_scale=2)
    with pytest.raises(ValueError, match=r"indices: expected shape \(B=1, L=4\)"):
        residual_step(torch.zeros(1, 3, 2, 2), one, *phi, scale=2, next_scale=None)
    with pytest.raises(ValueError, match="found 9 to 9"):
        residual_step(torch.zeros(1, 3, 2, 2), one + 9, *phi, scale=1, next_scale=None)


def test_opcheck() -> None:
    codes = bank(dtype=torch.float32, grad=True)
    z, layout = torch.randn(2, 3, 4, 5), ([1, 1, 2, 3, 4, 5], [0, 1, 1])
    torch.library.opcheck(OPS.residual_quantize.default, (z, *codes, *layout, 0.5, None, "l2"))
    codes = Bank(*(t.detach() for t in codes))
    out, indices = OPS.residual_quantize(z, *codes, *layout, 0.5, None, "l2")
    torch.library.opcheck(
        OPS.residual_quantize.default, (z.half(), *codes, *layout, 0.5, indices[:, :1], "cosine")
    )
    torch.library.opcheck(OPS.residual_decode_backward.default, (out, indices, *codes[:2], *layout, 0.5))
    grad_codes = bank(dtype=torch.float32, grad=True)
    torch.library.opcheck(OPS.residual_decode.default, (indices, *grad_codes, *layout, [4, 5], 0.5))


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
    def forward(z: Tensor, *codes: Tensor) -> tuple[Tensor, Tensor]:
        out = residual_quantize(z.sin(), *codes, scales=[1, 2], phi_index=[0, 1])
        again = residual_decode(out.indices, *codes, scales=[1, 2], phi_index=[0, 1], size=z.shape[2:])
        return out.indices, (out.reconstruction * again).sum()

    z, codes = torch.randn(1, 3, 2, 2, dtype=torch.float64), bank(grad=True)
    indices, loss = torch.compile(forward, fullgraph=True, backend="aot_eager")(z, *codes)
    expected_indices, expected = forward(z, *codes)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(loss, expected)
    for actual, want in zip(
        torch.autograd.grad(loss, codes), torch.autograd.grad(expected, codes), strict=True
    ):
        torch.testing.assert_close(actual, want, **TOLERANCES["float64_reordered"]._asdict())


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
