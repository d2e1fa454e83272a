from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.nn.sampling import sample_codes

SEEDS = st.integers(0, 2**31)
CODES = 12


def random_logits(seed: int, rows: int = 4, *, levels: int | None = None) -> Tensor:
    """Logits of order one; with `levels` few distinct values, so that ties abound."""
    generator = torch.Generator().manual_seed(seed)
    if levels is not None:
        return torch.randint(levels, (2, rows, CODES), generator=generator).float()
    return 2 * torch.randn(2, rows, CODES, generator=generator)


@given(seed=SEEDS, levels=st.integers(1, 4))
def test_greedy_takes_the_lowest_index_on_ties(seed: int, levels: int) -> None:
    logits = random_logits(seed, levels=levels)
    found = sample_codes(logits)
    assert found.dtype == torch.int64
    for row, chosen in zip(logits.view(-1, CODES).tolist(), found.flatten().tolist(), strict=True):
        assert chosen == row.index(max(row))


@given(seed=SEEDS, top_k=st.integers(0, CODES + 3), top_p=st.floats(0.01, 1.0))
def test_only_kept_codes_are_drawn(seed: int, top_k: int, top_p: float) -> None:
    logits = random_logits(seed)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros_like(logits, dtype=torch.bool)
    for place, row in enumerate(logits.view(-1, CODES)):
        order = row.argsort(descending=True)
        if top_k > 0:
            order = order[:top_k]
        # The smallest head of the order that holds a share top_p of what top-k left.
        share = row[order].double().softmax(0).cumsum(0)
        needed = int((share < top_p + 1e-6).sum()) + 1
        kept.view(-1, CODES)[place, order[:needed]] = True
    for _ in range(20):
        drawn = sample_codes(logits, top_k=top_k, top_p=top_p, generator=generator)
        assert drawn.shape == logits.shape[:-1]
        assert kept.gather(-1, drawn[..., None]).all()


def test_every_kept_code_is_drawn_at_its_rate() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)

    def rates(top_k: int, top_p: float) -> list[float]:
        drawn = sample_codes(logits, top_k=top_k, top_p=top_p, generator=generator)
        return [round(rate, 6) for rate in (drawn.bincount(minlength=4) / len(drawn)).tolist()]

    assert rates(0, 1.0) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.02)
    assert rates(3, 1.0) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0], abs=0.02)
    assert rates(0, 0.65) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.02)
    assert rates(3, 0.5) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.02)
    assert rates(0, 0.1) == [1, 0, 0, 0]
    assert rates(1, 1.0) == [1, 0, 0, 0]


@given(seed=SEEDS)
def test_a_generator_repeats_and_the_logits_stay(seed: int) -> None:
    logits = random_logits(seed)
    before = logits.clone()
    first, second = (
        sample_codes(logits, top_k=5, top_p=0.9, generator=torch.Generator().manual_seed(seed))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (5, 0.0), (5, -0.1), (5, 1.1)])
def test_wrong_options_are_errors(top_k: int, top_p: float) -> None:
    with pytest.raises(ValueError, match=r"top_[kp]: expected"):
        sample_codes(torch.zeros(1, 4), top_k=top_k, top_p=top_p)
