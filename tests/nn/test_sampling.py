from __future__ import annotations

from typing import Any

import pytest
import torch

from hitsr_fast.nn.sampling import sampling_plan
from hitsr_fast.ops import sample_codes


def test_guidance_rises_linearly_from_the_first_scale_to_the_last() -> None:
    assert sampling_plan(5, 5, guidance=2.0).strengths == (0.0, 0.5, 1.0, 1.5, 2.0)
    assert sampling_plan(5, 3, guidance=2.0).strengths == (0.0, 0.5, 1.0)
    assert sampling_plan(1, 1, guidance=2.0).strengths == (0.0,)


@pytest.mark.parametrize(
    ("options", "guided_steps"),
    [
        ({}, 0),
        ({"guidance": 1.0}, 5),
        ({"guidance": 1.0, "guided_scales": [1, 3]}, 4),
        ({"guidance": 1.0, "guided_scales": [0]}, 0),  # where its strength is 0
        ({"guidance": 1.0, "guided_scales": []}, 0),
    ],
)
def test_the_class_free_branch_runs_up_to_the_last_guided_scale(
    options: dict[str, Any], guided_steps: int
) -> None:
    assert sampling_plan(5, 5, **options).guided_steps == guided_steps


def test_draws_are_those_of_the_op() -> None:
    plan = sampling_plan(3, 3, guidance=1.0, top_k=5, top_p=0.8)
    logits, free = torch.randn(2, 2, 7, 12, generator=torch.Generator().manual_seed(0)).unbind()
    states = plan.states(logits.device, torch.Generator().manual_seed(1))
    assert states is not None and states.shape == (3, 2)
    generator = torch.Generator().manual_seed(1)  # the op takes two draws a call, in the order of the scales
    for step, guidance in enumerate((0.0, 0.5, 1.0)):
        expected = sample_codes(
            logits, uncond_logits=free, guidance=guidance, top_k=5, top_p=0.8, generator=generator
        )
        branches = torch.stack([logits, free][: 2 if guidance else 1])
        assert torch.equal(plan.draw(branches, states, step), expected)


def test_greedy_draws_nothing() -> None:
    plan, logits = sampling_plan(2, 2), torch.tensor([[[0.0, 3.0, 3.0]]])
    before = torch.random.get_rng_state()
    assert plan.states(logits.device, None) is None
    assert plan.draw(logits, None, 0).tolist() == [1]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": -1.0}, "guidance: expected a finite number of at least 0, found -1.0"),
        ({"guidance": float("nan")}, "guidance: expected a finite number"),
        ({"top_k": -1}, r"top_k: expected an integer from 0 to .*, found -1"),
        ({"top_k": 5, "top_p": 0.0}, r"top_p: expected a value in \(0, 1\], found 0.0"),
        ({"top_p": 1.1}, r"top_p: expected a value in \(0, 1\], found 1.1"),
        ({"guided_scales": [4]}, r"guided_scales: expected numbers from 0 to 3, found \[4\]"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling_plan(4, 4, **options)
