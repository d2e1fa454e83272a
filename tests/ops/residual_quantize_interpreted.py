"""The Triton backend of the residual quantizer, interpreted; test_residual_quantize_triton.py runs this file.

Triton asks for its interpreter once, as kernels are defined: hence a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import (
    Metric,
    nearest_code_triton,
    prepare_codebook,
    residual_decode,
    residual_quantize,
    residual_step,
)
from hitsr_fast.ops import residual_quantize_triton as triton
from hitsr_fast.reference.nearest_code import nearest_code as reference
from tests.ops.residual_quantizer import (
    Bank,
    assert_agrees,
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

OPS = torch.ops.hitsr_fast
METRICS: tuple[Metric, ...] = ("l2", "cosine")
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
SHIPPED = triton.search_constants, triton.update_constants


@pytest.fixture(scope="module", autouse=True)
def _backend() -> Iterator[None]:
    """The backend, with more at a time: the interpreter takes as long for a small tile as for a large one."""

    def search(*arguments: Any) -> dict[str, int]:
        constants = SHIPPED[0](*arguments)
        block = constants["BLOCK_N"]
        return constants | {"BLOCK_P": 16, "BLOCK_R": block, "ROWS": block, "BLOCK_C": 16}

    def update(*arguments: Any) -> dict[str, int]:
        return SHIPPED[1](*arguments) | {"ROWS": 8, "BLOCK_S": 128}

    with use_backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "search_constants", search)
        patch.setattr(triton, "update_constants", update)
        yield


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
    return reconstruction, pooled


def check(z: Tensor, codes: Bank, problem: dict[str, Any], metric: Metric = "l2", replayed: int = 0) -> Any:
    """Encode with all results, judge them, and hold decode and the steps to the same bits."""
    arguments = encode_arguments(problem)
    replay = None
    if replayed:
        replay = torch.randint(codes.codebook.shape[0], (z.shape[0], replayed))
    found = residual_quantize(
        z, *codes, **arguments, metric=metric, replay=replay, inputs=True, per_scale=True
    )
    assert_agrees(found, z, codes, **arguments, metric=metric, replayed=replayed)
    if replay is not None:
        assert torch.equal(found.indices[:, :replayed], replay)
    decoded = residual_decode(found.indices, *codes, **problem, inputs=True, per_scale=True)
    for one, other in zip(decoded, found[1:], strict=True):
        assert torch.equal(one, other)
    reconstruction, pooled = steps(found.indices, codes, problem)
    assert torch.equal(reconstruction, found.reconstruction)
    assert pooled[-1].shape == (*z.shape[:2], 0, 0)
    maps = [x.flatten(2).transpose(1, 2) for x in pooled[:-1]]
    assert torch.equal(torch.cat([found.inputs[:, :0], *maps], 1), found.inputs)
    return found


def test_as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "search_constants", SHIPPED[0])
    monkeypatch.setattr(triton, "update_constants", SHIPPED[1])
    for ratio in (0.0, 0.5):
        problem = {"size": (4, 9), "scales": [(2, 2), (4, 9)], "phi_index": [1, 0], "phi_ratio": ratio}
        check(torch.randn(1, 20, 4, 9), bank(140, 20, dtype=torch.float32), problem)


@settings(max_examples=8)
@given(problem=problems(), metric=st.sampled_from(METRICS), channels=st.sampled_from([1, 3, 17]))
def test_agrees_with_the_reference(problem: dict[str, Any], metric: Metric, channels: int) -> None:
    check(torch.randn(1, channels, *problem["size"]), bank(C=channels, dtype=torch.float32), problem, metric)


@pytest.mark.parametrize(("metric", "ratio"), [("l2", 0.5), ("cosine", 1.0), ("l2", 0.0)])
def test_a_rectangle(metric: Metric, ratio: float) -> None:
    problem = RECTANGLE | {"phi_ratio": ratio}
    check(torch.randn(2, 5, 9, 5), bank(150, 5, dtype=torch.float32), problem, metric)


def test_what_is_not_asked_for_changes_nothing() -> None:
    z, codes = torch.randn(2, 3, 4, 5), bank(dtype=torch.float32)
    arguments = encode_arguments(SMALL)
    expected = residual_quantize(z, *codes, **arguments, inputs=True, per_scale=True)
    for inputs, per_scale in [(False, False), (True, False), (False, True)]:
        found = residual_quantize(z, *codes, **arguments, inputs=inputs, per_scale=per_scale)
        assert (found.inputs is None, found.reconstructions is None) == (not inputs, not per_scale)
        for one, other in zip(found, expected, strict=True):
            assert one is None or torch.equal(one, other)
    decoded = residual_decode(found.indices, *codes, **SMALL)
    assert torch.equal(decoded.reconstruction, expected.reconstruction)


@pytest.mark.parametrize("channels", [16, 33])
def test_channels_in_parts(channels: int) -> None:
    """Channels of the convolution come in blocks of 32, those of the pooling in smaller ones."""
    problem = {"size": (3, 9), "scales": [(2, 2), (3, 9)], "phi_index": [1, 0], "phi_ratio": 0.5}
    check(torch.randn(1, channels, 3, 9), bank(140, channels, dtype=torch.float32), problem)


@pytest.mark.parametrize("replayed", [1, 27, 72])
def test_replay(replayed: int) -> None:
    check(torch.randn(1, 3, 9, 5), bank(dtype=torch.float32), RECTANGLE, replayed=replayed)


@pytest.mark.parametrize(
    ("few", "search", "update", "workspace"), [(4096, 1, 1, 2**23), (0, 7, 3, 2**23), (4096, 512, 1024, 1)]
)
def test_cuts_do_not_matter(
    few: int, search: int, update: int, workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of rows and places in turns or all at once, tiles of codes shared out or not."""
    z, codes = torch.randn(2, 3, 9, 5), bank(400, dtype=torch.float32)
    arguments = encode_arguments(RECTANGLE)
    expected = residual_quantize(z, *codes, **arguments, inputs=True)
    monkeypatch.setattr(triton, "_FEW_ROWS", few)
    monkeypatch.setattr(triton, "_SEARCH_PROGRAMS", search)
    monkeypatch.setattr(triton, "_UPDATE_PROGRAMS", update)
    monkeypatch.setattr(triton, "_WORKSPACE", workspace)
    found = residual_quantize(z, *codes, **arguments, inputs=True)
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_search_is_exact(kind: str, metric: Metric, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of the map's size leaves the rows as they are: each gets the definition's code."""
    monkeypatch.setattr(triton, "_FEW_ROWS", 4096 if kind in ("clustered", "near ties") else 0)
    x, codebook = rows_and_codes(kind, 3 * 20, 290, 5)
    z = x.view(3, 4, 5, 5).permute(0, 3, 1, 2)
    phi = torch.zeros(1, 5, 5, 3, 3), torch.zeros(1, 5)
    found = residual_quantize(z, codebook, *phi, scales=[(4, 5)], phi_index=[0], phi_ratio=0, metric=metric)
    assert torch.equal(found.indices.flatten(), reference(x, codebook, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_the_search_is_exact_on_what_it_pools(metric: Metric) -> None:
    """The pooling kernel gives the very rows that the search has pooled."""
    z, codes = torch.randn(2, 6, 7, 9) + 100, bank(300, 6, dtype=torch.float32)
    codes = codes._replace(codebook=codes.codebook + 100)
    for h, w in [(1, 1), (2, 4), (6, 5), (7, 8)]:
        pooled = torch.empty(2, h * w, 6)
        triton._pool(z, triton.Scale(h, w, 0, 0), pooled)
        found = residual_quantize(z, *codes, scales=[(h, w)], phi_index=[0], metric=metric)
        assert torch.equal(found.indices.flatten(), reference(pooled.flatten(0, 1), codes.codebook, metric))
        torch.testing.assert_close(pooled, rows(z, (h, w)), **TOLERANCES["float32_reordered"]._asdict())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_image_gives_0_and_disturbs_no_other(bad: float) -> None:
    z, codes = torch.randn(3, 3, 4, 5), bank(dtype=torch.float32)
    arguments = encode_arguments(SMALL)
    expected = residual_quantize(z, *codes, **arguments, inputs=True)
    z[1] = bad
    found = residual_quantize(z, *codes, **arguments, inputs=True)
    assert found.indices[1].eq(0).all()
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(one[::2], other[::2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_computed_in_float32(dtype: torch.dtype) -> None:
    z, codes = torch.randn(1, 3, 4, 4, dtype=dtype), bank().to(dtype)
    problem = {"size": (4, 4), "scales": [2, 4], "phi_index": [0, 1], "phi_ratio": 0.5}
    found, wide = check(z, codes, problem), check(z.float(), codes.to(torch.float32), problem)
    for one, other in zip(found, wide, strict=True):
        assert torch.equal(one, other)


def test_strides_do_not_matter() -> None:
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


@pytest.mark.parametrize("metric", METRICS)
def test_prepared_codebooks(metric: Metric) -> None:
    z, codes = torch.randn(1, 3, 4, 5), bank(40, dtype=torch.float32)
    prepared = prepare_codebook(codes.codebook, metric=metric)
    assert prepared.layout == nearest_code_triton.LAYOUT
    arguments: dict[str, Any] = {"scales": [2, (4, 5)], "phi_index": [0, 1], "metric": metric}
    one, other = (residual_quantize(z, *codes, **arguments, prepared=p) for p in (prepared, None))
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.reconstruction, other.reconstruction)


def test_no_image() -> None:
    codes = bank(dtype=torch.float32)
    found = residual_quantize(
        torch.zeros(0, 3, 9, 5), *codes, **encode_arguments(RECTANGLE), inputs=True, per_scale=True
    )
    assert [tuple(x.shape) for x in found] == [(0, 72), (0, 3, 9, 5), (0, 71, 3), (4, 0, 3, 9, 5)]
    decoded = residual_decode(found.indices, *codes, **RECTANGLE)
    assert decoded.reconstruction.shape == (0, 3, 9, 5)


def test_decode_of_any_codes() -> None:
    codes = bank(50, 6, dtype=torch.float32)
    indices = torch.randint(50, (2, 27))
    found = residual_decode(indices, *codes, **SMALL, inputs=True, per_scale=True)
    assert_decodes(found, indices, codes, **SMALL)


def test_opcheck() -> None:
    codes = bank(dtype=torch.float32)
    z, layout = torch.randn(2, 3, 4, 5), ([1, 1, 2, 3, 4, 5], [0, 1, 1])
    for wanted in (False, True):
        arguments = (z, *codes, [], "", *layout, 0.5, None, "l2", wanted, wanted)
        torch.library.opcheck(OPS.residual_quantize.default, arguments)
    indices = torch.randint(9, (2, 27))
    torch.library.opcheck(OPS.residual_decode.default, (indices, *codes, *layout, [4, 5], 0.5, True, True))
    torch.library.opcheck(
        OPS.residual_step.default,
        (z, indices[:, :6], codes.codebook, codes.phi_weight[0], codes.phi_bias[0], [2, 3], [4, 5], 0.5),
    )
