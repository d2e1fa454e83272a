"""Tiles over an image of any size, and the blending of their outputs row by row.

An output is built by laying one tile over the other: a tile fades in over a strip inside its overlap with the
one before, `canvas + ramp * (tile - canvas)`. Where tiles agree the result is exactly what they agree on, at
every overlap and even where three tiles meet, so no sum of weights is kept. Rows are handed on as soon as no
later tile can touch them: what is kept does not depend on the height of the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hitsr_fast.checks import check_integer


def tile_starts(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    """Fewest tile positions that cover `length`, evenly spread to its end, sharing `overlap` pixels or more.

    They rise; it is `(0,)` when one tile covers (or exceeds) the image.

    Raises:
        TypeError, ValueError: if an argument is no integer, below 1, or an overlap outside `[0, tile)`.
    """
    check_integer("length", length, 1)
    check_integer("tile", tile, 1)
    check_integer("overlap", overlap, 0, tile - 1, "tile - 1")
    if length <= tile:
        return (0,)
    steps = math.ceil((length - tile) / (tile - overlap))
    return tuple((length - tile) * i // steps for i in range(steps + 1))


def mirrored(length: int, padded: int, device: torch.device) -> Tensor:
    """Indices (padded,) that extend `length` pixels by mirroring at the borders, however few there are."""
    i = torch.arange(padded, device=device) % (2 * length)
    return torch.minimum(i, 2 * length - 1 - i)


@dataclass(frozen=True)
class TilePlan:
    """Where the tiles of an image lie. All figures are in input pixels."""

    height: int
    width: int
    tile: int
    overlap: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @classmethod
    def cover(cls, height: int, width: int, tile: int, overlap: int) -> TilePlan:
        """Plan for a `height x width` image; see `tile_starts` for the arguments."""
        tops, lefts = (tile_starts(side, tile, overlap) for side in (height, width))
        return cls(height, width, tile, overlap, tops, lefts)

    @property
    def num_tiles(self) -> int:
        """Tiles in the plan."""
        return len(self.tops) * len(self.lefts)

    def cut(self, rows: Tensor) -> Tensor:
        """Cut one band of (B, C, h, W) rows, `h = min(tile, height)` from one of `tops` on, into its tiles.

        They are (len(lefts), B, C, tile, tile); shorter sides are mirrored to the right and downwards.
        """
        if rows.shape[-2] < self.tile:
            rows = rows.index_select(-2, mirrored(rows.shape[-2], self.tile, rows.device))
        if self.width < self.tile:
            rows = rows.index_select(-1, mirrored(self.width, self.tile, rows.device))
        return torch.stack([rows[..., left : left + self.tile] for left in self.lefts])


def fade_in(starts: tuple[int, ...], index: int, tile: int, overlap: int, factor: int) -> Tensor:
    """Raised-cosine ramp with which tile `index` covers its predecessor: (tile * factor,) float32 in [0, 1].

    The ramp is `overlap * factor` long and lies in the middle of what the two tiles share: pixels near a
    tile's edge, where the model has least context, count least. The first tile has no predecessor and its
    ramp is 1 everywhere.
    """
    if index == 0:
        return torch.ones(tile * factor)
    shared = starts[index - 1] + tile - starts[index]
    begin = (shared - overlap) * factor / 2
    # A cross-fade of no length is a cut: any length under one pixel makes the clamp one.
    length = max(overlap * factor, 0.5)
    x = (torch.arange(tile * factor) + 0.5 - begin) / length
    return 0.5 - 0.5 * torch.cos(math.pi * x.clamp(0, 1))


class RowBlender:
    """Blends the output tiles of a plan at one factor, band by band from the top, and hands on finished rows.

    Example:
        >>> plan = TilePlan.cover(6, 9, tile=4, overlap=2)
        >>> image = torch.rand(1, 3, 6, 9)
        >>> blender = RowBlender(plan, factor=1)
        >>> rows = [blender.add_band(plan.cut(image[:, :, top : top + 4])) for top in plan.tops]
        >>> bool(torch.allclose(torch.cat(rows, dim=2), image))
        True
    """

    def __init__(self, plan: TilePlan, factor: int) -> None:
        self.plan, self.factor, self._band = plan, factor, 0
        # Rows of earlier bands that the next band reaches, (B, C, h, W * factor).
        self._pending: Tensor | None = None
        self._column_ramps = [
            fade_in(plan.lefts, i, plan.tile, plan.overlap, factor) for i in range(len(plan.lefts))
        ]

    def add_band(self, tiles: Tensor) -> Tensor:
        """Add the outputs for `plan.cut` of the next band, (len(lefts), B, C, tile * factor, tile * factor).

        Returns:
            (B, C, n, width * factor): the rows that are now final; after the last band, all the rest.

        Raises:
            ValueError: if `tiles` has another shape or all bands have been added.
        """
        plan, side = self.plan, self.plan.tile * self.factor
        if self._band == len(plan.tops):
            raise ValueError(f"tiles: expected {len(plan.tops)} bands, found one more")
        if tiles.dim() != 5 or len(tiles) != len(plan.lefts) or tiles.shape[-2:] != (side, side):
            raise ValueError(
                f"tiles: expected shape ({len(plan.lefts)}, B, C, {side}, {side}), found {tuple(tiles.shape)}"
            )
        band = self._blend_columns(tiles)
        if self._pending is not None:
            ramp = fade_in(plan.tops, self._band, plan.tile, plan.overlap, self.factor).to(band)
            shared = self._pending.shape[-2]
            band[..., :shared, :] = torch.lerp(self._pending, band[..., :shared, :], ramp[:shared, None])
        self._band += 1
        if self._band == len(plan.tops):
            self._pending = None
            return band[..., : (plan.height - plan.tops[-1]) * self.factor, :]
        final = (plan.tops[self._band] - plan.tops[self._band - 1]) * self.factor
        self._pending = band[..., final:, :].clone()
        return band[..., :final, :]

    def _blend_columns(self, tiles: Tensor) -> Tensor:
        plan, side = self.plan, self.plan.tile * self.factor
        _, b, c, _, _ = tiles.shape
        band = tiles.new_empty(b, c, side, max(plan.width, plan.tile) * self.factor)
        covered = 0
        for tile, left, ramp in zip(tiles, plan.lefts, self._column_ramps, strict=True):
            at = left * self.factor
            shared = covered - at
            if shared > 0:
                earlier = band[..., at:covered]
                band[..., at:covered] = torch.lerp(earlier, tile[..., :shared], ramp[:shared].to(band))
            shared = max(shared, 0)
            band[..., at + shared : at + side] = tile[..., shared:]
            covered = at + side
        return band[..., : plan.width * self.factor]
