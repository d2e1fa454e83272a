"""Switti's axial rotary embedding: where a token stands in its map, as a table for `attention_prologue`."""

from __future__ import annotations

import torch
from torch import Tensor

from hitsr_fast.checks import check_integer, check_number


def axial_rotary(
    side: int,
    head_dim: int,
    *,
    theta: float = 10000.0,
    extent: float = 128.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Cosines and sines for the tokens of a square map, row by row; every map spans the same extent.

    The first half of a head's pairs turns by the token's column, the second by its row: pair i of a half by
    `position * theta^(-4 i / head_dim)`, with `position = index * extent / (side - 1)`.

    Args:
        side: of the map, at least 1; the one token of the smallest stands at position 0.
        head_dim: D, a multiple of 4.
        theta: base of the frequencies, above 0 and finite.
        extent: position of the last column and row, finite.
        device: of the result.

    Returns:
        float32 `(side * side, D / 2, 2)`, of each token and pair the cosine and the sine. Computed in
        float64 on the CPU: the same on every device.

    Raises:
        TypeError: side or head_dim is not an integer, theta or extent not a number.
        ValueError: a value does not fit.

    Notes:
        Source: Switti (arXiv 2412.01819); the axial form of the rotary embedding (arXiv 2104.09864).

    Example:
        >>> axial_rotary(2, 4, extent=torch.pi / 2).round().abs()
        tensor([[[1., 0.],
                 [1., 0.]],
        <BLANKLINE>
                [[0., 1.],
                 [1., 0.]],
        <BLANKLINE>
                [[1., 0.],
                 [0., 1.]],
        <BLANKLINE>
                [[0., 1.],
                 [0., 1.]]])
    """
    check_integer("side", side, 1)
    check_integer("head_dim", head_dim, 4)
    if head_dim % 4 != 0:
        raise ValueError(f"head_dim: expected a multiple of 4, found {head_dim}")
    check_number("theta", theta)
    check_number("extent", extent)
    if theta <= 0:
        raise ValueError(f"theta: expected a value above 0, found {theta}")
    frequencies = theta ** -(torch.arange(0, head_dim, 4, dtype=torch.float64) / head_dim)
    position = torch.arange(side, dtype=torch.float64) * (extent / max(side - 1, 1))
    angles = position[:, None] * frequencies
    column, row = angles.repeat(side, 1), angles.repeat_interleave(side, dim=0)
    turns = torch.cat([column, row], dim=1)
    return torch.stack([turns.cos(), turns.sin()], dim=-1).to(device, torch.float32)
