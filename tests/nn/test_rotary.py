"""`axial_rotary` against the axial embedding by complex numbers, and what it is for: scores of distances."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from hitsr_fast.nn.rotary import axial_rotary
from hitsr_fast.ops import attention_prologue
from tests.tolerances import TOLERANCES


def token_by_token(side: int, head_dim: int, theta: float, extent: float) -> Tensor:
    """One pair of one token after the other, as the definition reads."""
    rows = []
    for token in range(side * side):
        row, column = divmod(token, side)
        pairs = []
        for index in (column, row):
            position = index * extent / (side - 1) if side > 1 else 0.0
            for i in range(0, head_dim, 4):
                angle = position * theta ** (-i / head_dim)
                pairs.append([math.cos(angle), math.sin(angle)])
        rows.append(pairs)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("side", "head_dim", "theta", "extent"),
    [(1, 64, 10000.0, 128.0), (4, 64, 10000.0, 128.0), (7, 72, 10000.0, 128.0), (5, 4, 10.0, 1.5)],
)
def test_follows_the_definition(side: int, head_dim: int, theta: float, extent: float) -> None:
    table = axial_rotary(side, head_dim, theta=theta, extent=extent)
    assert table.dtype == torch.float32 and table.is_contiguous()
    expected = token_by_token(side, head_dim, theta, extent).float()
    torch.testing.assert_close(table, expected, **TOLERANCES["few_float32_roundings"]._asdict())


def test_defaults_are_those_of_switti() -> None:
    assert torch.equal(axial_rotary(6, 64), axial_rotary(6, 64, theta=10000.0, extent=128.0))
    last = axial_rotary(6, 64)[-1]
    expected = torch.tensor([math.cos(128), math.sin(128)])
    for pair in (0, 16):  # the quickest of the column's and of the row's
        torch.testing.assert_close(last[pair], expected, **TOLERANCES["float32_reordered"]._asdict())


def test_scores_depend_on_the_distance() -> None:
    """One content at every place of a map: q of a token times k of another tells how far apart they are."""
    side, D = 5, 16
    content = torch.randn(1, 1, 3 * D, dtype=torch.float64).expand(1, side * side, 3 * D)
    caches = torch.zeros(2, 1, side * side, 1, D, dtype=torch.float64)
    rotary = axial_rotary(side, D, extent=4.0)
    q = attention_prologue(content, caches[0], caches[1], 0, rotary=rotary)
    scores = (q[0, :, 0] @ caches[0][0, :, 0].T).view(side, side, side, side)  # row, column, row, column
    shifted = scores[:-1, :-1, :-1, :-1], scores[1:, 1:, 1:, 1:]
    torch.testing.assert_close(*shifted, **TOLERANCES["float32_reordered"]._asdict())
    assert not torch.allclose(scores[:, :-1, :, :-1], scores[:, :-1, :, 1:])
    assert not torch.allclose(scores[:-1, :, :-1], scores[:-1, :, 1:])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"side": 0}, ValueError, "side: expected an integer of at least 1, found 0"),
        ({"side": 2.0}, TypeError, "side: expected an integer of at least 1, found 2.0"),
        ({"head_dim": 0}, ValueError, "head_dim: expected an integer of at least 4, found 0"),
        ({"head_dim": 8.0}, TypeError, "head_dim: expected an integer of at least 4, found 8.0"),
        ({"head_dim": 30}, ValueError, "head_dim: expected a multiple of 4, found 30"),
        ({"theta": 0.0}, ValueError, "theta: expected a value above 0, found 0.0"),
        ({"theta": math.inf}, ValueError, "theta: expected a finite number, found inf"),
        ({"theta": None}, TypeError, "theta: expected a finite number, found None"),
        ({"extent": math.inf}, ValueError, "extent: expected a finite number, found inf"),
        ({"extent": math.nan}, ValueError, "extent: expected a finite number, found nan"),
        ({"extent": "8"}, TypeError, "extent: expected a finite number, found '8'"),
    ],
)
def test_bad_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        axial_rotary(**({"side": 4, "head_dim": 64} | changed))


def test_device() -> None:
    assert axial_rotary(2, 4, device="meta").device.type == "meta"
