from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hitsr_fast.nn.sampling import SamplingOptions
from hitsr_fast.ops import sample_codes


def test_guidance_rises_linearly_from_the_first_scale_to_the_last() -> None:
    assert SamplingOptions(guidance=2.0).plan(5, 5).strengths == (0.0, 0.5, 1.0, 1.5, 2.0)
    assert SamplingOptions(guidance=2.0).plan(5, 3).strengths == (0.0, 0.5, 1.0)
    assert SamplingOptions(guidance=2.0).plan(1, 1).strengths == (0.0,)


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
    assert SamplingOptions(**options).plan(5, 5).guided_steps == guided_steps


def test_draws_are_those_of_the_op() -> None:
    plan = SamplingOptions(guidance=1.0, top_k=5, top_p=0.8, temperature=0.7).plan(3, 3)
    logits, free = torch.randn(2, 2, 7, 12, generator=torch.Generator().manual_seed(0)).unbind()
    states = plan.states(logits.device, torch.Generator().manual_seed(1))
    assert states is not None and states.shape == (3, 2)
    generator = torch.Generator().manual_seed(1)  # the op takes two draws a call, in the order of the scales
    for step, guidance in enumerate((0.0, 0.5, 1.0)):
        expected = sample_codes(
            logits,
            uncond_logits=free,
            guidance=guidance,
            top_k=5,
            top_p=0.8,
            temperature=0.7,
            generator=generator,
        )
        branches = torch.stack([logits, free][: 2 if guidance else 1])
        assert torch.equal(plan.draw(branches, states, step), expected)


@pytest.mark.parametrize(
    "numbers", [{"top_k": 5, "top_p": 0.8}, {"top_k": 7, "temperature": 0.5}, {"guidance": 0.3, "top_k": 0}]
)
def test_a_plan_of_the_same_kind_draws_by_the_settings_of_another(numbers: dict[str, Any]) -> None:
    drawn = SamplingOptions(guidance=2.0, guided_scales=[1, 3], top_k=9)
    plan, kind = replace(drawn, **numbers).plan(4, 4), drawn.plan(4, 4).kind
    assert kind == plan.kind
    logits = torch.randn(2, 50, 12, generator=torch.Generator().manual_seed(0))
    states = plan.states(logits.device, torch.Generator().manual_seed(1))
    settings = plan.settings(logits.device)
    for step in range(4):
        branches = logits[: 1 + step % 2]
        assert torch.equal(kind.draw(branches, states, step, settings), plan.draw(branches, states, step))


def test_what_takes_other_steps_is_of_another_kind() -> None:
    kinds = {
        SamplingOptions(**options).plan(4, steps).kind
        for steps in (3, 4)
        for options in (
            {},
            {"guidance": 1.0},
            {"guidance": 2.0},
            {"guidance": 2.0, "guided_scales": [2]},
            {"top_k": 0},
            {"top_k": 5, "top_p": 0.1, "temperature": 3.0},
        )
    }
    assert len(kinds) == 2 * 4


def test_greedy_draws_nothing() -> None:
    plan, logits = SamplingOptions().plan(2, 2), torch.tensor([[[0.0, 3.0, 3.0]]])
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
        ({"top_k": 5, "top_p": -0.1}, r"top_p: expected a number from 0 to 1, found -0.1"),
        ({"top_p": 1.1}, r"top_p: expected a number from 0 to 1, found 1.1"),
        ({"temperature": 0.0}, "temperature: expected a number from 1e-30 to .*, found 0.0"),
        ({"seed": -1}, "seed: expected an integer from 0 to .*, found -1"),
        ({"guided_scales": [-1]}, "guided_scales: expected an integer of at least 0, found -1"),
        ({"guided_scales": [4]}, r"guided_scales: expected numbers from 0 to 3, found \[4\]"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options).plan(4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 1.5}, "top_k: expected an integer from 0 to .*, found 1.5"),
        ({"guided_scales": 5}, "guided_scales: expected numbers of scales or None, found 5"),
        ({"guided_scales": [1.5]}, "guided_scales: expected an integer of at least 0, found 1.5"),
        ({"seed": "now"}, "seed: expected an integer from 0 to .*, found 'now'"),
        ({"temperature": None}, "temperature: expected a number from .*, found None"),
    ],
)
def test_options_of_another_type_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SamplingOptions(**options)


@pytest.mark.parametrize("top_p", [0.0, 1.0])
def test_both_ends_of_top_p_keep_all(top_p: float) -> None:
    logits = torch.tensor([20.0, 0.0, -3.0]).expand(1, 20000, 3)
    plan = SamplingOptions(top_k=0, top_p=top_p, temperature=10.0).plan(1, 1)
    codes = plan.draw(logits, plan.states(logits.device, torch.Generator().manual_seed(0)), 0)
    assert codes.unique().tolist() == [0, 1, 2]


def test_guidance_below_zero_leads_to_the_class_free_branch() -> None:
    plan = SamplingOptions().plan(1, 1)._replace(strengths=(-0.5,))
    assert plan.guided_steps == 1
    logits = torch.tensor([[[4.0, 1.0, 0.0]], [[0.0, 4.0, 0.0]]])  # half of each: 2, 2.5, 0
    assert plan.draw(logits, None, 0).tolist() == [1]


def test_numbers_may_be_those_of_numpy() -> None:
    given = {"guidance": np.float32(0.5), "top_k": np.int64(3), "top_p": np.float32(0.5), "seed": np.int64(3)}
    options = SamplingOptions(**given, guided_scales=(np.int64(1),), temperature=np.float32(0.5))
    plain = SamplingOptions(guidance=0.5, top_k=3, top_p=0.5, seed=3, guided_scales=(1,), temperature=0.5)
    assert repr(options) == repr(plain)
    found, expected = (option.generator(torch.device("cpu")) for option in (options, plain))
    assert found is not None and expected is not None
    assert torch.equal(found.get_state(), expected.get_state())
