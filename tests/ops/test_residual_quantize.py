"""`residual_quantize`, `residual_decode` and `residual_step` on every backend: agreement and contract."""

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
    ResidualDecoded,
    ResidualQuantized,
    nearest_code,
    phi_table,
    prepare_codebook,
    residual_decode,
    residual_quantize,
    residual_step,
)
from tests.ops.residual_quantizer import (
    Bank,
    assert_agrees,
    assert_as_good,
    assert_decodes,
    backends,
    bank,
    encode_arguments,
    forced,
    problems,
    rows,
)
from tests.tolerances import TOLERANCES

METRICS: st.SearchStrategy[Metric] = st.sampled_from(["l2", "cosine"])
on_every_backend = pytest.mark.parametrize("backend", backends("residual_quantize"))
PHOTO = Path(__file__).parents[2] / "examples" / "budgie-osprey.jpg"
HIT_SCALES = MODELS["hit-d16"].scales


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
    out = residual_quantize(z, *codes, **encode_arguments(problem), inputs=True, per_scale=True)
    expected = plain(z, codes, problem["scales"], problem["phi_index"], problem["phi_ratio"])
    assert torch.equal(out.indices, expected[0])
    for found, want in zip(out[1:], expected[1:], strict=True):
        torch.testing.assert_close(found, want, **TOLERANCES["float64_reordered"]._asdict())


@on_every_backend
@given(problem=problems(), metric=METRICS, data=st.data())
def test_each_scale_finds_the_nearest_codes(
    backend: str, problem: dict[str, Any], metric: Metric, data: st.DataObject
) -> None:
    z, codes, arguments = (
        torch.randn(2, 3, *problem["size"]),
        bank(dtype=torch.float32),
        encode_arguments(problem),
    )
    count = data.draw(st.integers(0, len(problem["scales"])))
    replay = torch.randint(0, 9, (2, sum(h * w for h, w in problem["scales"][:count])))
    with forced("residual_quantize", backend):
        out = residual_quantize(
            z, *codes, **arguments, metric=metric, replay=replay, inputs=True, per_scale=True
        )
    assert torch.equal(out.indices[:, : replay.shape[1]], replay)
    assert_agrees(out, z, codes, **arguments, metric=metric, replayed=replay.shape[1])


@on_every_backend
@pytest.mark.parametrize(
    ("scales", "C", "P"), [(MODELS["var-256"].scales, 32, 4), ([(1, 3), (4, 5), (9, 7)], 8, 1)]
)
def test_scales_of_models(backend: str, scales: list[Any], C: int, P: int) -> None:
    H, W = (scales[-1], scales[-1]) if isinstance(scales[-1], int) else scales[-1]
    z, codes = torch.randn(2, C, H, W), bank(K=512, C=C, P=P, dtype=torch.float32)
    arguments: dict[str, Any] = {"scales": scales, "phi_index": phi_table(len(scales), P)}
    with forced("residual_quantize", backend):
        out = residual_quantize(z, *codes, **arguments, inputs=True, per_scale=True)
    assert_agrees(out, z, codes, **arguments)


@on_every_backend
def test_a_whole_pyramid_is_as_good_as_the_definition(backend: str) -> None:
    z, codes = torch.randn(1, 32, 32, 32), bank(K=4096, C=32, P=4, dtype=torch.float32)
    arguments: dict[str, Any] = {"scales": HIT_SCALES, "phi_index": phi_table(10)}
    with forced("residual_quantize", backend):
        out = residual_quantize(z, *codes, **arguments)
    with use_backend("reference"):
        expected = residual_quantize(z, *codes, **arguments)
    assert_agrees(out, z, codes, **arguments)
    assert_as_good(out, expected, z)


@on_every_backend
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
        "scales": tokenizer.config.scales[: tokenizer.config.target_steps[target]],
        "phi_index": quantizer.phi_index(target),
        "phi_ratio": tokenizer.config.phi_ratio,
    }
    codes = Bank(quantizer.codebook.detach(), quantizer.phi_weight.detach(), quantizer.phi_bias.detach())
    with torch.no_grad():
        z = tokenizer.encode(crops[:6] / 127.5 - 1)
    with forced("residual_quantize", backend):
        out = residual_quantize(z, *codes, **arguments)
    with use_backend("reference"):
        expected = residual_quantize(z, *codes, **arguments)
    assert_as_good(out, expected, z)


@pytest.mark.parametrize("batch", [1, 5])
def test_threads_do_not_matter(batch: int) -> None:
    z, codes = torch.randn(batch, 32, 16, 16), bank(K=512, C=32, dtype=torch.float32)
    arguments: dict[str, Any] = {"scales": [2, 5, 9, 16], "phi_index": [0, 0, 1, 1]}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(residual_quantize(z, *codes, **arguments, inputs=True, per_scale=True))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for result, expected in zip(other, found[0], strict=True):
            assert result is not None and expected is not None and torch.equal(result, expected)


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


@pytest.mark.parametrize("backend", backends("residual_decode"))
@given(problem=problems())
def test_decode_is_the_sum_of_what_the_scales_add(backend: str, problem: dict[str, Any]) -> None:
    codes = bank(dtype=torch.float32)
    indices = torch.randint(0, 9, (2, sum(h * w for h, w in problem["scales"])))
    with forced("residual_decode", backend):
        out = residual_decode(indices, *codes, **problem, inputs=True, per_scale=True)
        bare = residual_decode(indices, *codes, **problem)
    assert_decodes(out, indices, codes, **problem)
    assert torch.equal(bare.reconstruction, out.reconstruction)
    assert bare.inputs is None and bare.reconstructions is None


@on_every_backend
@given(problem=problems())
def test_decode_gives_what_encode_gave(backend: str, problem: dict[str, Any]) -> None:
    z, codes = torch.randn(2, 3, *problem["size"]), bank(dtype=torch.float32)
    with forced("residual_quantize", backend):
        out = residual_quantize(z, *codes, **encode_arguments(problem), inputs=True, per_scale=True)
    with forced("residual_decode", backend):
        decoded = residual_decode(out.indices, *codes, **problem, inputs=True, per_scale=True)
    for found, expected in zip(decoded, out[1:], strict=True):
        assert found is not None and expected is not None
        if backend in backends("residual_decode"):
            assert torch.equal(found, expected)
        else:
            torch.testing.assert_close(found, expected, **TOLERANCES["float32_reordered"]._asdict())


@on_every_backend
@given(problem=problems())
def test_what_is_asked_for_changes_nothing_else(backend: str, problem: dict[str, Any]) -> None:
    z, codes, arguments = (
        torch.randn(2, 3, *problem["size"]),
        bank(dtype=torch.float32),
        encode_arguments(problem),
    )
    with forced("residual_quantize", backend):
        bare = residual_quantize(z, *codes, **arguments)
        assert bare.inputs is None and bare.reconstructions is None
        for asked in ({"inputs": True}, {"per_scale": True}, {"inputs": True, "per_scale": True}):
            out = residual_quantize(z, *codes, **arguments, **asked)
            assert torch.equal(out.indices, bare.indices)
            assert torch.equal(out.reconstruction, bare.reconstruction)
            assert (out.inputs is not None) == ("inputs" in asked)
            if out.reconstructions is not None:
                assert torch.equal(out.reconstructions[-1], out.reconstruction)
        prepared = prepare_codebook(codes.codebook)
        again = residual_quantize(z, *codes, **arguments, prepared=prepared)
        assert torch.equal(again.indices, bare.indices)
        assert torch.equal(again.reconstruction, bare.reconstruction)


@pytest.mark.parametrize("backend", backends("residual_step"))
@given(problem=problems())
def test_steps_add_up_to_decode(backend: str, problem: dict[str, Any]) -> None:
    codes, size, scales = bank(dtype=torch.float32), problem["size"], problem["scales"]
    indices = [torch.randint(0, 9, (2, h * w)) for h, w in scales]
    reconstruction = torch.zeros(2, 3, *size)
    inputs = [torch.zeros(2, 0, 3)]
    for i, scale in enumerate(scales):
        following = scales[i + 1] if i + 1 < len(scales) else None
        phi = problem["phi_index"][i]
        with forced("residual_step", backend):
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
            assert pooled.untyped_storage().data_ptr() != reconstruction.untyped_storage().data_ptr()
            inputs.append(pooled.flatten(2).transpose(1, 2))
    walked = ResidualDecoded(reconstruction, torch.cat(inputs, 1), None)
    assert_decodes(walked, torch.cat(indices, 1), codes, **problem)
    if backend in backends("residual_decode"):
        with forced("residual_decode", backend):
            decoded = residual_decode(torch.cat(indices, 1), *codes, **problem)
        assert torch.equal(reconstruction, decoded.reconstruction)


@on_every_backend
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
    with forced("residual_quantize", backend):
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


@on_every_backend
def test_an_exact_code_is_found_and_leaves_nothing(backend: str) -> None:
    codes = bank(K=50, dtype=torch.float32)
    wanted = torch.randint(0, 50, (2, 20))
    z = codes.codebook[wanted].transpose(1, 2).reshape(2, 3, 4, 5)
    with forced("residual_quantize", backend):
        out = residual_quantize(z, *codes, scales=[(4, 5)], phi_index=[0], phi_ratio=0.0)
    assert torch.equal(out.indices, wanted)
    assert torch.equal(out.reconstruction, z)


@on_every_backend
def test_images_of_a_batch_are_independent(backend: str) -> None:
    z, codes = torch.randn(3, 3, 6, 5), bank(dtype=torch.float32)
    z[1] = torch.nan
    arguments: dict[str, Any] = {"scales": [1, 3, (6, 5)], "phi_index": [0, 1, 1]}
    with forced("residual_quantize", backend):
        out = residual_quantize(z, *codes, **arguments)
    others = ResidualQuantized(out.indices[::2], out.reconstruction[::2], None, None)
    assert_agrees(others, z[::2], codes, **arguments)
    assert out.indices[1].eq(0).all()


@on_every_backend
def test_an_empty_batch(backend: str) -> None:
    codes = bank(dtype=torch.float32)
    with forced("residual_quantize", backend):
        out = residual_quantize(
            torch.zeros(0, 3, 4, 4), *codes, scales=[2, 4], phi_index=[0, 1], inputs=True, per_scale=True
        )
    shapes = [tuple(result.shape) for result in out if result is not None]
    assert shapes == [(0, 20), (0, 3, 4, 4), (0, 16, 3), (2, 0, 3, 4, 4)]


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_input_is_computed_in_float32(backend: str, dtype: torch.dtype) -> None:
    z, codes = torch.randn(1, 3, 4, 4, dtype=dtype), bank(dtype=dtype)
    arguments: dict[str, Any] = {"scales": [2, 4], "phi_index": [0, 1], "inputs": True, "per_scale": True}
    with forced("residual_quantize", backend):
        out = residual_quantize(z, *codes, **arguments)
        wide = residual_quantize(z.float(), *codes.to(torch.float32), **arguments)
    assert torch.equal(out.indices, wide.indices)
    for found, expected in zip(out[1:], wide[1:], strict=True):
        assert found is not None and expected is not None
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, **TOLERANCES["float32_reordered"]._asdict())


@on_every_backend
def test_strided_latent_is_left_alone(backend: str) -> None:
    z, codes = torch.randn(2, 4, 5, 3).permute(0, 3, 1, 2), bank(dtype=torch.float32)
    before = z.clone()
    with forced("residual_quantize", backend):
        out = residual_quantize(z, *codes, scales=[2, (4, 5)], phi_index=[0, 1])
        dense = residual_quantize(z.contiguous(), *codes, scales=[2, (4, 5)], phi_index=[0, 1])
    assert torch.equal(z, before)
    assert torch.equal(out.indices, dense.indices)
    assert torch.equal(out.reconstruction, dense.reconstruction)


@on_every_backend
def test_cosine_metric(backend: str) -> None:
    z, codes = torch.randn(1, 3, 2, 2), bank(dtype=torch.float32)
    with forced("residual_quantize", backend):
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


@pytest.mark.parametrize("backend", backends("residual_step"))
def test_autograd_learns_that_the_step_wrote(backend: str) -> None:
    codes, reconstruction = bank(C=8, dtype=torch.float32), torch.ones(2, 8, 7, 9)
    factor = torch.ones_like(reconstruction, requires_grad=True)
    loss = (factor * reconstruction).sum()
    phi = (codes.phi_weight[0], codes.phi_bias[0])
    indices = torch.zeros(2, 4, dtype=torch.int64)
    with forced("residual_step", backend), torch.no_grad():
        residual_step(reconstruction, indices, codes.codebook, *phi, scale=2, next_scale=None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
