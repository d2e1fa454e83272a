"""Draws: the same however the samples are grouped, others for other keys, and of the right distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hitsr_fast.train.draw import Draw


def draw(index: list[int] | torch.Tensor, seed: int = 0, phase: str = "phase") -> Draw:
    return Draw(seed, phase, torch.as_tensor(index), "cpu")


@given(index=st.lists(st.integers(0, 2**62), min_size=1, max_size=6), seed=st.integers(0, 2**32))
def test_a_sample_draws_the_same_in_any_company(index: list[int], seed: int) -> None:
    whole = draw(index, seed)
    for row, one in enumerate(index):
        alone = draw([one], seed)
        assert whole.uniform("a", 3, 2)[row].equal(alone.uniform("a", 3, 2)[0])
        assert whole.normal("a", 5)[row].equal(alone.normal("a", 5)[0])
        assert whole.integers("a", 9)[row].equal(alone.integers("a", 9)[0])
        assert whole.seeds("a")[row] == alone.seeds("a")[0]
        assert whole[row : row + 1].uniform("a").equal(alone.uniform("a"))


def test_each_part_of_the_key_counts() -> None:
    draws = [draw([1]), draw([2]), draw([1], seed=1), draw([1], phase="other")]
    found = [one.uniform("a", 4).tolist() for one in draws] + [draw([1]).uniform("b", 4).tolist()]
    assert len({str(values) for values in found}) == 5
    assert len(set(found[0][0])) == 4


def test_distributions() -> None:
    many = draw(torch.arange(4000))
    uniform, normal = many.uniform("u", 50), many.normal("n", 50)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.003)
    assert uniform.std().item() == pytest.approx(12**-0.5, abs=0.003)
    assert torch.corrcoef(uniform[:, :20].T).sub(torch.eye(20)).abs().max() < 0.08
    assert torch.corrcoef(uniform[:2000:100]).sub(torch.eye(20)).abs().max() < 0.6
    assert normal.mean().abs() < 0.01 and normal.std().item() == pytest.approx(1, abs=0.01)
    assert normal.pow(4).mean().item() == pytest.approx(3, abs=0.1)
    counts = torch.bincount(many.integers("i", 7, 50).flatten(), minlength=7)
    assert len(counts) == 7 and counts.min() > 0.97 * counts.max()
