"""The residual quantizer and its decode and step on every backend: agreement, gradients, errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from benchmarks.shapes import MODELS
from hitsr_fast.dispatch import use_backend
from hitsr_fast.models import HitVar
from hitsr_fast.ops import (
    Metric,
    ResidualQuantized,
    nearest_code,
    phi_table,
    prepare_codebook,
    residual_decode,
    residual_quantize,
    residual_step,
)
from hitsr_fast.ops import residual_quantize_triton as triton
from hitsr_fast.reference.nearest_code import nearest_code as definition
from tests.ops.backends import fewer_when_interpreted, placed
from tests.ops.residual_quantizer import (
    Bank,
    assert_agrees,
    assert_as_good,
    assert_decodes,
    bank,
    encode_arguments,
    pairs_of,
    problems,
    rows,
)
from tests.ops.test_nearest_code import KINDS
from tests.ops.test_nearest_code import problem as rows_and_codes
from tests.tolerances import TOLERANCES

METRICS: tuple[Metric, ...] = ("l2", "cosine")
not_interpreted = pytest.mark.backends("reference", "cpu")  # too much for Triton's interpreter
PHOTO = Path(__file__).parents[2] / "examples" / "budgie-osprey.jpg"
HIT: dict[str, Any] = {
    "scales": list(MODELS["hit-d16"].scales),
    "phi_index": [0, 0, 1, 1, 1, 2, 2, 3, 3, 3],
}
RECTANGLE: dict[str, Any] = {
    "size": (9, 5),
    "scales": [(1, 1), (2, 3), (5, 4), (9, 5)],
    "phi_index": [0, 1, 1, 0],
    "phi_ratio": 0.5,
}


SMALL: dict[str, Any] = {
    "size": (4, 5),
    "scales": [(1, 1), (2, 3), (4, 5)],
    "phi_index": [0, 1, 1],
    "phi_ratio": 0.5,
}


def plain(
    z: Tensor, codes: Bank, scales: Sequence[tuple[int, int]], phi_index: Sequence[int], ratio: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The algorithm as VAR writes it: no shortcut where sizes match."""
    residual, reconstruction, indices = z.clone(), torch.zeros_like(z), []
    maps = []
    for (h, w), phi in zip(scales, phi_index, strict=True):
        pooled = F.interpolate(residual, size=(h, w), mode="area").permute(0, 2, 3, 1)
        index = (pooled[..., None, :] - codes.codebook).square().sum(-1).argmin(-1)
        up = F.interpolate(codes.codebook[index].permute(0, 3, 1, 2), size=z.shape[2:], mode="bicubic")
        through = F.conv2d(up, codes.phi_weight[phi], codes.phi_bias[phi], padding=1)
        step = (1 - ratio) * up + ratio * through
        reconstruction = reconstruction + step
        residual = residual - step
        indices.append(index.flatten(1))
        maps.append(reconstruction)
    pooled = [rows(m, size) for m, size in zip(maps[:-1], scales[1:], strict=True)]
    return (
        torch.cat(indices, 1),
        reconstruction,
        torch.cat([z.new_empty(len(z), 0, z.shape[1]), *pooled], 1),
        torch.stack(maps),
    )


@given(problem=problems())
def test_the_definition_is_the_plain_algorithm(problem: dict[str, Any]) -> None:
    z, codes = torch.randn(2, 3, *problem["size"], dtype=torch.float64), bank()
    out = residual_quantize(z, *codes, **encode_arguments(problem), return_inputs=True, per_scale=True)
    expected = plain(z, codes, problem["scales"], problem["phi_index"], problem["phi_ratio"])
    assert torch.equal(out.indices, expected[0])
    for found, want in zip(out[1:], expected[1:], strict=True):
        torch.testing.assert_close(found, want, **TOLERANCES["float64_reordered"]._asdict())


def steps(indices: Tensor, codes: Bank, problem: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """What the sampler's steps leave, and the maps that they return."""
    scales = pairs_of(problem["scales"])
    reconstruction = torch.zeros(indices.shape[0], codes.codebook.shape[1], *problem["size"])
    pooled, start = [], 0
    for i, (h, w) in enumerate(scales):
        phi = problem["phi_index"][i]
        pooled.append(
            residual_step(
                reconstruction,
                indices[:, start : start + h * w],
                codes.codebook,
                codes.phi_weight[phi],
                codes.phi_bias[phi],
                scale=(h, w),
                next_scale=scales[i + 1] if i + 1 < len(scales) else None,
                phi_ratio=problem["phi_ratio"],
            )
        )
        start += h * w
        assert pooled[-1].untyped_storage().data_ptr() != reconstruction.untyped_storage().data_ptr()
    return reconstruction, pooled


def check(z: Tensor, codes: Bank, problem: dict[str, Any], metric: Metric = "l2", replayed: int = 0) -> Any:
    """Encode with all results, judge them, and hold decode and the steps to the same bits."""
    arguments = encode_arguments(problem)
    replay = None
    if replayed:
        replay = torch.randint(codes.codebook.shape[0], (z.shape[0], replayed))
    found = residual_quantize(
        z, *codes, **arguments, metric=metric, replay=replay, return_inputs=True, per_scale=True
    )
    assert_agrees(found, z, codes, **arguments, metric=metric, replayed=replayed)
    if replay is not None:
        assert torch.equal(found.indices[:, :replayed], replay)
    decoded = residual_decode(found.indices, *codes, **problem, return_inputs=True, per_scale=True)
    for one, other in zip(decoded, found[1:], strict=True):
        assert torch.equal(one, other)
    reconstruction, pooled = steps(found.indices, codes, problem)
    assert torch.equal(reconstruction, found.reconstruction)
    assert pooled[-1].shape == (*z.shape[:2], 0, 0)
    maps = [x.flatten(2).transpose(1, 2) for x in pooled[:-1]]
    assert torch.equal(torch.cat([found.inputs[:, :0], *maps], 1), found.inputs)
    return found


@fewer_when_interpreted
@given(
    problem=problems(),
    metric=st.sampled_from(METRICS),
    channels=st.sampled_from([1, 3, 17]),
    replayed=st.integers(0, 4),
)
def test_agrees_with_the_reference(
    backend: str, problem: dict[str, Any], metric: Metric, channels: int, replayed: int
) -> None:
    z, codes = torch.randn(1, channels, *problem["size"]), bank(C=channels, dtype=torch.float32)
    check(z, codes, problem, metric, sum(h * w for h, w in problem["scales"][:replayed]))


@pytest.mark.parametrize(("metric", "ratio"), [("l2", 0.5), ("cosine", 1.0), ("l2", 0.0)])
def test_a_rectangle(backend: str, metric: Metric, ratio: float) -> None:
    problem = RECTANGLE | {"phi_ratio": ratio}
    check(torch.randn(2, 5, 9, 5), bank(150, 5, dtype=torch.float32), problem, metric)


@pytest.mark.parametrize("replayed", [1, 27, 72])
def test_replay(backend: str, replayed: int) -> None:
    check(torch.randn(1, 3, 9, 5), bank(dtype=torch.float32), RECTANGLE, replayed=replayed)


@pytest.mark.parametrize("channels", [16, 33])
def test_channels_in_parts(backend: str, channels: int) -> None:
    """Triton's come in blocks of 32 to the convolution, in smaller ones to the pooling."""
    problem = {"size": (3, 9), "scales": [(2, 2), (3, 9)], "phi_index": [1, 0], "phi_ratio": 0.5}
    check(torch.randn(1, channels, 3, 9), bank(140, channels, dtype=torch.float32), problem)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_search_is_exact(
    backend: str, kind: str, metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale of the map's size leaves the rows as they are: each gets the definition's code."""
    monkeypatch.setattr(triton, "_FEW_ROWS", 4096 if kind in ("clustered", "near ties") else 0)
    x, codebook = placed(*rows_and_codes(kind, 3 * 20, 290, 5))
    z = x.view(3, 4, 5, 5).permute(0, 3, 1, 2)
    phi = torch.zeros(1, 5, 5, 3, 3), torch.zeros(1, 5)
    found = residual_quantize(z, codebook, *phi, scales=[(4, 5)], phi_index=[0], phi_ratio=0, metric=metric)
    assert torch.equal(found.indices.flatten(), definition(x, codebook, metric))


@not_interpreted
@pytest.mark.parametrize(
    ("scales", "C", "P"), [(MODELS["var-256"].scales, 32, 4), ([(1, 3), (4, 5), (9, 7)], 8, 1)]
)
def test_scales_of_models(backend: str, scales: list[Any], C: int, P: int) -> None:
    H, W = (scales[-1], scales[-1]) if isinstance(scales[-1], int) else scales[-1]
    z, codes = torch.randn(2, C, H, W), bank(K=512, C=C, P=P, dtype=torch.float32)
    arguments: dict[str, Any] = {"scales": scales, "phi_index": phi_table(len(scales), P)}
    out = residual_quantize(z, *codes, **arguments, return_inputs=True, per_scale=True)
    assert_agrees(out, z, codes, **arguments)


@not_interpreted
def test_a_whole_pyramid_is_as_good_as_the_definition(backend: str) -> None:
    z, codes = torch.randn(1, 32, 32, 32), bank(K=4096, C=32, P=4, dtype=torch.float32)
    out = residual_quantize(z, *codes, **HIT)
    with use_backend("reference"):
        expected = residual_quantize(z, *codes, **HIT)
    assert_agrees(out, z, codes, **HIT)
    assert_as_good(out, expected, z)


@not_interpreted
@pytest.mark.parametrize("target", [0, 1, 2])
def test_latents_of_photos(backend: str, target: int) -> None:
    """Nearly all tokens are the definition's, and none of the quality is lost."""
    tokenizer = HitVar.from_pretrained("hit-tiny", dtype=torch.float32).tokenizer
    with Image.open(PHOTO) as image:
        photo = torch.from_numpy(np.array(image.convert("RGB")))
    side = tokenizer.config.target_sizes[target] * tokenizer.config.stride
    crops = photo.movedim(2, 0).unfold(1, side, side).unfold(2, side, side).movedim(0, 2).flatten(0, 1)
    quantizer = tokenizer.quantize
    arguments: dict[str, Any] = {
        "scales": tokenizer.config.scales[: tokenizer.config.pyramid.steps[target]],
        "phi_index": quantizer.bank(target).phi_index,
        "phi_ratio": tokenizer.config.phi_ratio,
    }
    codes = Bank(quantizer.codebook.detach(), quantizer.phi_weight.detach(), quantizer.phi_bias.detach())
    with torch.no_grad():
        z = tokenizer.encode(crops[:6] / 127.5 - 1)
    out = residual_quantize(z, *codes, **arguments)
    with use_backend("reference"):
        expected = residual_quantize(z, *codes, **arguments)
    assert_as_good(out, expected, z)


def test_the_rule_of_agreement_tells_a_wrong_code() -> None:
    z, codes = torch.randn(1, 8, 8, 8), bank(K=64, C=8, dtype=torch.float32)
    arguments: dict[str, Any] = {"scales": [2, 5, 8], "phi_index": [0, 1, 1]}
    out = residual_quantize(z, *codes, **arguments)
    residual = z - residual_decode(out.indices[:, :4], *codes, scales=[2], phi_index=[0], size=8)[0]
    distance = torch.cdist(rows(residual, (5, 5)), codes.codebook)[0]
    second = distance.topk(2, largest=False).indices[:, 1]
    for token in (0, 12, 24):
        replay = out.indices[:, :29].clone()
        replay[0, 4 + token] = second[token]
        wrong = residual_quantize(z, *codes, **arguments, replay=replay)
        assert_agrees(wrong, z, codes, **arguments, replayed=29)
        with pytest.raises(AssertionError, match=r"scale 1: a code is .* from the best"):
            assert_agrees(wrong, z, codes, **arguments)
    shifted = out._replace(reconstruction=out.reconstruction + 1e-5)
    with pytest.raises(AssertionError):
        assert_agrees(shifted, z, codes, **arguments)


@fewer_when_interpreted
@given(problem=problems())
def test_decode_is_the_sum_of_what_the_scales_add(backend: str, problem: dict[str, Any]) -> None:
    codes = bank(dtype=torch.float32)
    indices = torch.randint(0, 9, (2, sum(h * w for h, w in problem["scales"])))
    out = residual_decode(indices, *codes, **problem, return_inputs=True, per_scale=True)
    bare = residual_decode(indices, *codes, **problem)
    assert_decodes(out, indices, codes, **problem)
    assert torch.equal(bare.reconstruction, out.reconstruction)
    assert bare.inputs is None and bare.reconstructions is None


@not_interpreted
@given(problem=problems())
def test_what_is_asked_for_changes_nothing_else(backend: str, problem: dict[str, Any]) -> None:
    z, codes, arguments = (
        torch.randn(2, 3, *problem["size"]),
        bank(dtype=torch.float32),
        encode_arguments(problem),
    )
    bare = residual_quantize(z, *codes, **arguments)
    assert bare.inputs is None and bare.reconstructions is None
    for asked in ({"return_inputs": True}, {"per_scale": True}, {"return_inputs": True, "per_scale": True}):
        out = residual_quantize(z, *codes, **arguments, **asked)
        assert torch.equal(out.indices, bare.indices)
        assert torch.equal(out.reconstruction, bare.reconstruction)
        assert (out.inputs is not None) == ("return_inputs" in asked)
        if out.reconstructions is not None:
            assert torch.equal(out.reconstructions[-1], out.reconstruction)
    prepared = prepare_codebook(codes.codebook)
    again = residual_quantize(z, *codes, **arguments, prepared=prepared)
    assert torch.equal(again.indices, bare.indices)
    assert torch.equal(again.reconstruction, bare.reconstruction)


@pytest.mark.backends("triton")
def test_what_is_not_asked_for_changes_nothing(backend: str) -> None:
    z, codes = torch.randn(2, 3, 4, 5), bank(dtype=torch.float32)
    arguments = encode_arguments(SMALL)
    expected = residual_quantize(z, *codes, **arguments, return_inputs=True, per_scale=True)
    for inputs, per_scale in [(False, False), (True, False), (False, True)]:
        found = residual_quantize(z, *codes, **arguments, return_inputs=inputs, per_scale=per_scale)
        assert (found.inputs is None, found.reconstructions is None) == (not inputs, not per_scale)
        for one, other in zip(found, expected, strict=True):
            assert one is None or torch.equal(one, other)
    decoded = residual_decode(found.indices, *codes, **SMALL)
    assert torch.equal(decoded.reconstruction, expected.reconstruction)


@not_interpreted
@given(problem=problems(), data=st.data())
def test_replay_of_own_codes_changes_nothing(
    backend: str, problem: dict[str, Any], data: st.DataObject
) -> None:
    z, codes, arguments = (
        torch.randn(2, 3, *problem["size"]),
        bank(dtype=torch.float32),
        encode_arguments(problem),
    )
    count = data.draw(st.integers(0, len(problem["scales"])))
    tokens = sum(h * w for h, w in problem["scales"][:count])
    out = residual_quantize(z, *codes, **arguments)
    again = residual_quantize(z, *codes, **arguments, replay=out.indices[:, :tokens])
    assert torch.equal(again.indices, out.indices)
    assert torch.equal(again.reconstruction, out.reconstruction)


def test_replayed_codes_are_used_and_shape_the_rest() -> None:
    z, codes = torch.randn(2, 3, 4, 4), bank(dtype=torch.float32)
    free = residual_quantize(z, *codes, scales=[2, 4], phi_index=[0, 1])
    replay = (free.indices[:, :4] + 1) % 9
    with use_backend("reference"):
        out = residual_quantize(z, *codes, scales=[2, 4], phi_index=[0, 1], replay=replay)
        first = residual_decode(replay, *codes, scales=[2], phi_index=[0], size=(4, 4)).reconstruction
    left = (z - first).permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.equal(out.indices[:, :4], replay)
    assert torch.equal(out.indices[:, 4:].flatten(), nearest_code(left, codes.codebook))


def test_an_exact_code_is_found_and_leaves_nothing(backend: str) -> None:
    codes = bank(K=50, dtype=torch.float32)
    wanted = torch.randint(0, 50, (2, 20))
    z = codes.codebook[wanted].transpose(1, 2).reshape(2, 3, 4, 5)
    out = residual_quantize(z, *codes, scales=[(4, 5)], phi_index=[0], phi_ratio=0.0)
    assert torch.equal(out.indices, wanted)
    assert torch.equal(out.reconstruction, z)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_images_of_a_batch_are_independent(backend: str, bad: float) -> None:
    z, codes = torch.randn(3, 3, 4, 5), bank(40, dtype=torch.float32)
    arguments = encode_arguments(SMALL)
    expected = residual_quantize(z, *codes, **arguments, return_inputs=True)
    z[1] = bad
    found = residual_quantize(z, *codes, **arguments, return_inputs=True)
    assert found.indices[1].eq(0).all()
    others = ResidualQuantized(found.indices[::2], found.reconstruction[::2], None, None)
    assert_agrees(others, z[::2], codes, **arguments)
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(one[::2], other[::2])


def test_an_empty_batch(backend: str) -> None:
    codes, z = bank(dtype=torch.float32), torch.zeros(0, 3, 9, 5)
    found = residual_quantize(z, *codes, **encode_arguments(RECTANGLE), return_inputs=True, per_scale=True)
    assert [tuple(x.shape) for x in found] == [(0, 72), (0, 3, 9, 5), (0, 71, 3), (4, 0, 3, 9, 5)]
    decoded = residual_decode(found.indices, *codes, **RECTANGLE)
    assert decoded.reconstruction.shape == (0, 3, 9, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_input_is_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    z, codes = torch.randn(1, 3, 4, 4, dtype=dtype), bank(dtype=dtype)
    arguments: dict[str, Any] = {
        "scales": [2, 4],
        "phi_index": [0, 1],
        "return_inputs": True,
        "per_scale": True,
    }
    out = residual_quantize(z, *codes, **arguments)
    wide = residual_quantize(z.float(), *codes.to(torch.float32), **arguments)
    assert torch.equal(out.indices, wide.indices)
    for found, expected in zip(out[1:], wide[1:], strict=True):
        assert found is not None and expected is not None
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, **TOLERANCES["float32_reordered"]._asdict())


def test_strided_latent_is_left_alone(backend: str) -> None:
    z, codes = torch.randn(2, 4, 5, 3).permute(0, 3, 1, 2), bank(dtype=torch.float32)
    before = z.clone()
    out = residual_quantize(z, *codes, scales=[2, (4, 5)], phi_index=[0, 1])
    dense = residual_quantize(z.contiguous(), *codes, scales=[2, (4, 5)], phi_index=[0, 1])
    assert torch.equal(z, before)
    assert torch.equal(out.indices, dense.indices)
    assert torch.equal(out.reconstruction, dense.reconstruction)


def test_cosine_metric(backend: str) -> None:
    z, codes = torch.randn(1, 3, 2, 2), bank(dtype=torch.float32)
    out = residual_quantize(z, *codes, scales=[2], phi_index=[0], metric="cosine")
    assert torch.equal(out.indices[0], nearest_code(z[0].flatten(1).T, codes.codebook, metric="cosine"))


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


@pytest.mark.parametrize("num_phi", range(1, 33))
def test_phi_tables_are_those_of_numpy(num_phi: int) -> None:
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(margin, 1 - margin, num_phi)
    for scales in range(2, 33):
        expected = [int(np.argmin(np.abs(ticks - i / (scales - 1)))) for i in range(scales)]
        assert phi_table(scales, num_phi) == expected


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
        ({"z": torch.zeros(3, 4, 4)}, ValueError, r"z: expected shape \(B, C=3, H, W\)"),
        ({"z": torch.zeros(1, 3, 4, 4, dtype=torch.int32)}, TypeError, "z: expected dtype"),
        (
            {"z": torch.zeros(1, 5, 4, 4)},
            ValueError,
            r"z: expected shape \(B, C=3, H, W\), found \(1, 5, 4, 4\)",
        ),
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
        ({"phi_ratio": 1.5}, ValueError, "phi_ratio: expected a number from 0 to 1, found 1.5"),
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


def test_a_prepared_codebook_must_be_of_this_codebook() -> None:
    codebook = torch.randn(9, 3)
    for prepared, error, message in [
        (codebook, TypeError, "prepared: expected a PreparedCodebook, found Tensor"),
        (
            prepare_codebook(codebook, metric="cosine"),
            ValueError,
            "expected one for metric l2, found one for",
        ),
        (prepare_codebook(codebook.half()), TypeError, "prepared: expected dtype float32, found float16"),
        (prepare_codebook(codebook[:8]), ValueError, r"prepared: expected shape \(K=9, C=3\)"),
        (
            prepare_codebook(codebook + 1),
            ValueError,
            "prepared: expected the values of codebook, found others",
        ),
    ]:
        with pytest.raises(error, match=message):
            quantize_with(codebook=codebook, prepared=prepared)
    assert isinstance(
        quantize_with(codebook=codebook, prepared=prepare_codebook(codebook)), ResidualQuantized
    )


def test_the_step_needs_memory_of_its_own() -> None:
    codes, expanded = bank(C=8, dtype=torch.float32), torch.zeros(1, 8, 7, 9).expand(2, 8, 7, 9)
    phi = (codes.phi_weight[0], codes.phi_bias[0])
    indices = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="reconstruction: expected memory for each element"):
        residual_step(expanded, indices, codes.codebook, *phi, scale=2, next_scale=None)


@pytest.mark.parametrize("scale", [np.int64(2), [np.int64(2), 2]])
def test_sides_may_be_numpys(scale: Any) -> None:
    z, codes = torch.randn(1, 3, 4, 4), bank(dtype=torch.float32)
    found = residual_quantize(z, *codes, scales=[scale], phi_index=[0])
    assert torch.equal(found.indices, residual_quantize(z, *codes, scales=[2], phi_index=[0]).indices)
    with pytest.raises(ValueError, match="scales: expected a side"):
        residual_quantize(z, *codes, scales=[1.5], phi_index=[0])  # type: ignore[list-item]


def test_a_float64_latent_is_computed_in_float32() -> None:
    z, codes = torch.randn(2, 3, 6, 5), bank(dtype=torch.float32)
    wide = residual_quantize(z.double(), *codes, scales=[2, (6, 5)], phi_index=[0, 1])
    found = residual_quantize(z, *codes, scales=[2, (6, 5)], phi_index=[0, 1])
    assert torch.equal(wide.indices, found.indices)
    assert torch.equal(wide.reconstruction, found.reconstruction)


def test_strides_of_codes_and_of_a_step(backend: str) -> None:
    z, codes = torch.randn(2, 3, 4, 5), bank(dtype=torch.float32)
    expected = residual_quantize(z, *codes, **encode_arguments(SMALL))
    strided = Bank(*(torch.stack([tensor, tensor], -1)[..., 0] for tensor in codes))
    for view in (z.to(memory_format=torch.channels_last), z.mT.contiguous().mT, z.double()):
        before = view.clone()
        found = residual_quantize(view, *strided, **encode_arguments(SMALL))
        assert torch.equal(found.indices, expected.indices)
        assert torch.equal(found.reconstruction, expected.reconstruction)
        assert torch.equal(view, before)
    reconstruction = torch.zeros(2, 3, 5, 4).mT
    indices = torch.stack([expected.indices, expected.indices], -1)[..., 0]
    residual_step(
        reconstruction,
        indices[:, :1],
        strided.codebook,
        strided.phi_weight[0],
        strided.phi_bias[0],
        scale=1,
        next_scale=None,
    )
    decoded = residual_decode(indices[:, :1], *codes, scales=[1], phi_index=[0], size=(4, 5))
    assert torch.equal(reconstruction, decoded.reconstruction)


# --- gradients of the definition: nothing else takes float64


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


def test_what_has_no_gradient() -> None:
    z, codes = torch.randn(1, 3, 2, 2, requires_grad=True), bank(dtype=torch.float32, grad=True)
    out = residual_quantize(z, *codes, scales=[1, 2], phi_index=[0, 0], return_inputs=True, per_scale=True)
    assert out.inputs is not None and out.reconstructions is not None
    assert not out.indices.requires_grad and not out.inputs.requires_grad
    for result in (out.reconstruction, out.reconstructions):
        assert torch.autograd.grad(result.sum(), z, allow_unused=True, retain_graph=True) == (None,)


def test_compiles_with_a_prepared_codebook() -> None:
    z, codes = torch.randn(1, 3, 2, 2), bank(dtype=torch.float32)
    prepared = prepare_codebook(codes.codebook)

    def forward(z: Tensor) -> Tensor:
        return residual_quantize(z, *codes, scales=[1, 2], phi_index=[0, 1], prepared=prepared).indices

    assert torch.equal(torch.compile(forward, fullgraph=True, backend="aot_eager")(z), forward(z))
