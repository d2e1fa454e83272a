"""The shapes of the models are those of their papers and their published code."""

from __future__ import annotations

import pytest

from benchmarks.shapes import MODELS


@pytest.mark.parametrize(
    ("model", "tokens", "positions"),
    [
        ("var-256", 680, 680),
        ("var-512", 2240, 2240),
        ("varsr", 2240, 3264),
        ("hit-d16", 3452, 4476),
        ("hit-tiny", 863, 1119),
        ("hitoksr", 1024, 1024),
    ],
)
def test_tokens_and_positions(model: str, tokens: int, positions: int) -> None:
    shape = MODELS[model]
    assert (shape.tokens, sum(shape.blocks)) == (tokens, positions)


@pytest.mark.parametrize("model", sorted(set(MODELS) - {"toy"}))
def test_heads_have_64_channels(model: str) -> None:
    shape = MODELS[model]
    assert (shape.D, shape.D * shape.heads) == (64, shape.width)


def test_a_step_comes_after_the_prefix_and_the_scales_before() -> None:
    assert MODELS["hit-d16"].step(0) == (0, 1024 + 16)
    assert MODELS["hit-d16"].step(9) == (3452, 1024)
    assert MODELS["varsr"].step(1) == (1025, 4)


def test_pairs_are_those_of_the_mask() -> None:
    shape = MODELS["toy"]
    level = [number for number, length in enumerate(shape.blocks) for _ in range(length)]
    assert shape.pairs == sum(key <= query for query in level for key in level)


def test_maps_of_the_autoencoders() -> None:
    assert MODELS["hit-d16"].maps == [(160, 512), (160, 256), (320, 128), (320, 64), (640, 32)]
    assert MODELS["hit-tiny"].maps == [(96, 32), (128, 16)]
    assert MODELS["hitoksr"].maps == []
