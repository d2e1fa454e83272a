"""Tile plans cover any image, and blending gives back what tiles agree on."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.imaging.tiles import RowBlender, TilePlan, fade_in, mirrored, tile_starts

sides = st.integers(1, 40)
tiles = st.integers(1, 9).flatmap(lambda tile: st.tuples(st.just(tile), st.integers(0, tile - 1)))


@given(length=sides, tile_and_overlap=tiles)
def test_tiles_cover_the_image_and_share_the_overlap(length: int, tile_and_overlap: tuple[int, int]) -> None:
    tile, overlap = tile_and_overlap
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] == max(length - tile, 0)
    for a, b in pairwise(starts):
        assert 0 < b - a <= tile - overlap
    if len(starts) > 1:  # one tile fewer would not do
        assert (len(starts) - 2) * (tile - overlap) + tile < length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 4, 1), "length"), ((5, 0, 0), "tile"), ((5, 4, 4), "overlap"), ((5, 4, -1), "overlap")],
)
def test_impossible_plans_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        tile_starts(*arguments)


def test_mirroring_repeats_the_border_and_works_for_one_pixel() -> None:
    assert mirrored(3, 8, torch.device("cpu")).tolist() == [0, 1, 2, 2, 1, 0, 0, 1]
    assert mirrored(1, 4, torch.device("cpu")).tolist() == [0, 0, 0, 0]


def blended(image: Tensor, plan: TilePlan, factor: int, model: object) -> Tensor:
    blender = RowBlender(plan, factor)
    rows = []
    for top in plan.tops:
        cut = plan.cut(image[:, :, top : top + plan.tile])
        rows.append(blender.add_band(torch.stack([model(tile) for tile in cut])))  # type: ignore[operator]
    return torch.cat(rows, dim=2)


@given(
    height=sides,
    width=sides,
    tile_and_overlap=tiles,
    factor=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 9),
)
def test_a_pixelwise_function_survives_tiling_bit_for_bit(
    height: int, width: int, tile_and_overlap: tuple[int, int], factor: int, seed: int
) -> None:
    def model(x: Tensor) -> Tensor:
        return x.repeat_interleave(factor, -1).repeat_interleave(factor, -2) * 3 - 1

    image = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    plan = TilePlan.cover(height, width, *tile_and_overlap)
    assert torch.equal(blended(image, plan, factor, model), model(image))


@given(height=sides, width=sides, tile_and_overlap=tiles, factor=st.sampled_from([1, 2, 4]))
def test_where_tiles_differ_the_result_lies_between_them(
    height: int, width: int, tile_and_overlap: tuple[int, int], factor: int
) -> None:
    values = iter(torch.rand(10_000).tolist())

    def model(x: Tensor) -> Tensor:
        side = x.shape[-1] * factor
        return torch.full((1, 1, side, side), next(values))

    out = blended(
        torch.zeros(1, 1, height, width), TilePlan.cover(height, width, *tile_and_overlap), factor, model
    )
    assert out.shape == (1, 1, height * factor, width * factor)
    assert out.min() >= 0 and out.max() <= 1


def test_a_cross_fade_has_no_step() -> None:
    ramp = fade_in((0, 12), 1, tile=16, overlap=4, factor=4)
    assert ramp.shape == (64,)
    assert (ramp.diff() >= 0).all() and ramp[0] < 0.02 and (ramp[16:] == 1).all()
    assert ramp.diff().max() < 0.11  # 16 pixels from 0 to 1
    assert torch.allclose(ramp[:16] + ramp[:16].flip(0), torch.ones(16))
    assert fade_in((0, 16), 1, tile=16, overlap=0, factor=1).tolist() == [1.0] * 16
    assert (
        fade_in((0, 14), 1, tile=16, overlap=0, factor=1).tolist() == [0.0] + [1.0] * 15
    )  # a cut in the middle


def test_wrong_bands_are_refused() -> None:
    plan = TilePlan.cover(4, 8, 4, 0)
    blender = RowBlender(plan, 2)
    with pytest.raises(ValueError, match=r"tiles: expected shape \(2, B, C, 8, 8\)"):
        blender.add_band(torch.zeros(2, 1, 3, 4, 4))
    blender.add_band(torch.zeros(2, 1, 3, 8, 8))
    with pytest.raises(ValueError, match="tiles: expected 1 bands, found one more"):
        blender.add_band(torch.zeros(2, 1, 3, 8, 8))
