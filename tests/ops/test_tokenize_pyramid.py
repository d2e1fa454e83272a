"""`tokenize_pyramid`: the targets of Algorithm 1 in one call."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from hitsr_fast.ops import TokenizedPyramid, prepare_codebook, residual_quantize, tokenize_pyramid
from tests.ops.residual_quantizer import assert_agrees, bank
from tests.tolerances import TOLERANCES

TARGETS: dict[str, Any] = {
    "scales": [1, 2, 3, (3, 4), (5, 6)],
    "target_steps": [2, 3, 5],
    "phi_index": [[0, 1], [0, 1, 1], [1, 1, 0, 0, 1]],
}


def latents(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 3, *size, dtype=dtype) for size in ((2, 2), (3, 4), (5, 6))]


def test_each_target_continues_the_one_before(backend: str) -> None:
    maps, codes = latents(), bank(dtype=torch.float32)
    out = tokenize_pyramid(maps, *codes, **TARGETS)
    replay = None
    for target, z in enumerate(maps):
        steps = TARGETS["target_steps"][target]
        arguments = {"scales": TARGETS["scales"][:steps], "phi_index": TARGETS["phi_index"][target]}
        alone = residual_quantize(z, *codes, **arguments, replay=replay)
        assert torch.equal(out.indices[:, : alone.indices.shape[1]], alone.indices)
        assert torch.equal(out.reconstructions[target], alone.reconstruction)
        replayed = 0 if replay is None else replay.shape[1]
        assert_agrees(alone, z, codes, **arguments, replayed=replayed)
        replay = alone.indices
    assert replay is not None and torch.equal(out.indices, replay)


def test_fewer_latents_give_a_prefix() -> None:
    maps, codes = latents(), bank(dtype=torch.float32)
    out = tokenize_pyramid(maps, *codes, **TARGETS)
    two = tokenize_pyramid(maps[:2], *codes, **TARGETS)
    assert torch.equal(two.indices, out.indices[:, : 1 + 4 + 9])
    assert len(two.reconstructions) == 2


def test_the_codebook_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return prepare_codebook(*args, **kwargs)

    module = importlib.import_module("hitsr_fast.ops.residual_quantize")
    monkeypatch.setattr(module, "prepare_codebook", counted)
    maps, codes = latents(), bank(dtype=torch.float32)
    out = tokenize_pyramid(maps, *codes, **TARGETS)
    assert len(calls) == 1
    prepared = prepare_codebook(codes.codebook)
    again = tokenize_pyramid(maps, *codes, **TARGETS, prepared=prepared)
    assert len(calls) == 1
    assert torch.equal(again.indices, out.indices)


def test_gradients_are_those_of_the_targets() -> None:
    maps, codes = latents(torch.float64), bank(grad=True)
    weights = [torch.randn_like(z) for z in maps]

    def total(reconstructions: list[Tensor]) -> Tensor:
        return torch.stack([(r * w).sum() for r, w in zip(reconstructions, weights, strict=True)]).sum()

    found = torch.autograd.grad(total(tokenize_pyramid(maps, *codes, **TARGETS).reconstructions), codes)
    reconstructions, replay = [], None
    for target, z in enumerate(maps):
        scales = TARGETS["scales"][: TARGETS["target_steps"][target]]
        out = residual_quantize(
            z, *codes, scales=scales, phi_index=TARGETS["phi_index"][target], replay=replay
        )
        reconstructions.append(out.reconstruction)
        replay = out.indices
    for actual, want in zip(found, torch.autograd.grad(total(reconstructions), codes), strict=True):
        torch.testing.assert_close(actual, want, **TOLERANCES["float64_reordered"]._asdict())


def test_compiles_without_a_graph_break() -> None:
    maps, codes = latents(), bank(dtype=torch.float32)

    def tokenize(maps: list[Tensor]) -> TokenizedPyramid:
        return tokenize_pyramid(maps, *codes, **TARGETS)

    found, expected = torch.compile(tokenize, fullgraph=True, backend="aot_eager")(maps), tokenize(maps)
    assert torch.equal(found.indices, expected.indices)
    for a, b in zip(found.reconstructions, expected.reconstructions, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": []}, "latents: expected 1 to 3 maps, found 0"),
        (
            {"target_steps": [2, 2, 5]},
            r"target_steps: expected increasing numbers from 1 to 5, found \[2, 2, 5\]",
        ),
        ({"target_steps": [0, 2, 5]}, "target_steps: expected increasing numbers"),
        ({"target_steps": [1, 2, 6]}, "target_steps: expected increasing numbers"),
        ({"target_steps": []}, "target_steps: expected increasing numbers"),
        ({"phi_index": [[0, 1]]}, "phi_index: expected a list for each of 3 targets, found 1"),
        ({"phi_index": [[0], [0], [0]]}, "phi_index: expected an entry for each of 2 scales, found 1"),
        (
            {"latents": [torch.zeros(1, 3, 1, 1)]},
            r"scales: expected at most the map's \(1, 1\), found \(2, 2\)",
        ),
        ({"latents": [torch.zeros(1, 4, 2, 2)]}, r"latents\[0\]: expected shape \(B, C=3, H, W\)"),
        (
            {"latents": [torch.zeros(1, 3, 2, 2), torch.zeros(2, 3, 3, 4)]},
            r"latents\[1\]: expected a batch of 1, found 2",
        ),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"latents": latents(), **bank(dtype=torch.float32)._asdict(), **TARGETS}
    with pytest.raises(ValueError, match=message):
        tokenize_pyramid(**(arguments | changes))
