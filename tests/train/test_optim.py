"""Rates, optimisers, clipping and averages against their formulas, and steps that are skipped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hitsr_fast.train import optim
from hitsr_fast.train.checkpoint import TrainState
from hitsr_fast.train.config import Phase, ScheduleConfig
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.optim import Ema, Muon, clip_by_group, learning_rate, make_optimizers, orthogonal
from hitsr_fast.train.parallel import Parallel
from hitsr_fast.train.task import Group
from hitsr_fast.train.trainer import take_step
from tests.tolerances import TOLERANCES
from tests.train.toy import Toy, batches_of, toy_phase

ALONE = Parallel("cpu")
CLOSE = TOLERANCES["float32_reordered"]._asdict()


# --- rates


def expected_rate(step: int, decay: str) -> float:
    """100 steps, of which 20 rise from 0.1; to 0.05."""
    if step < 20:
        return 0.1 + 0.9 * step / 20
    along = (step - 20) / 80
    shape = {
        "cosine": (1 + math.cos(math.pi * along)) / 2,
        "linear": 1 - along,
        "lin0": 1.0 if along < 0.05 else (1 - along) / 0.95,
        "constant": 1.0,
    }[decay]
    return 1.0 if decay == "constant" else 0.05 + 0.95 * shape


@pytest.mark.parametrize("decay", ["cosine", "linear", "lin0", "constant"])
def test_learning_rates_are_their_formulas(decay: Any) -> None:
    config = ScheduleConfig(steps=100, warmup=0.2, warmup_from=0.1, decay=decay, final_lr=0.05)
    for step in range(101):
        assert learning_rate(step, config) == pytest.approx(expected_rate(step, decay), rel=1e-12)
    plain = ScheduleConfig(steps=100, warmup=0.0, decay=decay)
    assert learning_rate(0, plain) == 1.0


# --- optimisers


def with_gradients(phase: Phase, factor: float = 1.0) -> tuple[Toy, list[torch.optim.Optimizer]]:
    """The toy task, and gradients of one batch."""
    task = Toy(phase)
    optimizers = make_optimizers(task, phase, ALONE)
    fill_gradients(task, phase, 0, factor)
    return task, optimizers


def fill_gradients(task: Toy, phase: Phase, step: int, factor: float = 1.0) -> None:
    task.zero_grad()
    for batch in batches_of(phase, step):
        (task(batch, Draw(5, "toy", batch.index, "cpu")).total * factor).backward()


def take(optimizers: list[torch.optim.Optimizer], found_inf: float = 0.0) -> None:
    for optimizer in optimizers:
        optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
        optimizer.step()


def test_adamw_is_pytorchs() -> None:
    phase = toy_phase(muon=0.0)
    task, ours = with_gradients(phase)
    other, _ = with_gradients(phase)
    named = dict(other.named_parameters())
    groups = [
        {"params": [named[n] for n in g.names], "lr": g.lr, "weight_decay": g.weight_decay}
        for g in other.groups()
    ]
    theirs = torch.optim.AdamW(groups, betas=phase.optim.betas)
    for step in range(4):
        for each in (task, other):
            fill_gradients(each, phase, step)
        take(ours)
        theirs.step()
    for (name, a), b in zip(task.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name, **CLOSE)
    assert not torch.equal(task.enter.weight, Toy(phase).enter.weight)


def moved_blocks(phase: Phase, theirs: bool) -> list[Tensor]:
    """By how much the blocks' matrices move in three steps."""
    task, ours = with_gradients(phase)
    (muon,) = [optimizer for optimizer in ours if isinstance(optimizer, Muon)]
    (group,) = muon.param_groups
    before = [parameter.detach().clone() for parameter in group["params"]]
    other = torch.optim.Muon(
        [dict(params=group["params"])],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        momentum=0.95,
        nesterov=True,
        adjust_lr_fn="original",
    )
    for step in range(3):
        fill_gradients(task, phase, step)
        if theirs:
            other.step()
        else:
            take([muon])
    return [p.detach() - old for p, old in zip(group["params"], before, strict=True)]


def check_muon() -> None:
    """As PyTorch's, whose iteration is in bfloat16 on a CPU too: here it stays in float32."""
    phase = toy_phase()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "bfloat16", Tensor.float)
        expected = moved_blocks(phase, True)
    for ours, theirs in zip(moved_blocks(phase, False), expected, strict=True):
        assert ours.norm() > 0.05
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_muon_is_pytorchs() -> None:
    check_muon()


def test_muon_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is for left out: the momentum as it is, of the same norm."""

    def plain(matrix: Tensor) -> Tensor:
        return matrix / matrix.norm() * min(matrix.shape) ** 0.5

    monkeypatch.setattr(optim, "orthogonal", plain)
    with pytest.raises(AssertionError):
        check_muon()


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5, 5)])
def test_what_is_made_orthogonal_is(shape: tuple[int, int]) -> None:
    """All singular values near 1, which is what the iteration's coefficients are made for."""
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert ((values > 0.6) & (values < 1.3)).all()
    assert orthogonal(torch.zeros(shape)).eq(0).all()


def test_the_toy_is_trained_by_both() -> None:
    kinds = {type(o).__name__: o.param_groups[0]["name"] for o in with_gradients(toy_phase())[1]}
    assert kinds == {"AdamW": "rest", "Muon": "blocks"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda groups: groups[:1], "in no group: blocks.0.down.bias"),
        (lambda groups: [*groups, groups[0]], "in two groups: blocks"),
        (lambda groups: [*groups, Group("c", ["still.weight"], "adamw", 1.0, 0.0)], "not trained: still"),
        (lambda groups: [g._replace(optimizer="muon") for g in groups], "no matrix, under Muon: "),
    ],
)
def test_groups_are_all_parameters(change: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Toy(toy_phase())
    groups = change(task.groups())
    monkeypatch.setattr(task, "groups", lambda: groups)
    with pytest.raises(ValueError, match=f"groups: .*{text}"):
        make_optimizers(task, toy_phase(), ALONE)


# --- clipping


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("factor", [1e-3, 10.0])
def test_each_group_is_clipped_by_itself(factor: float, scale: float | None) -> None:
    task, optimizers = with_gradients(toy_phase(), factor)
    exact = {name: p.grad.double() for name, p in task.named_parameters() if p.grad is not None}
    if scale is not None:
        for parameter in task.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
    given = None if scale is None else torch.tensor(scale)
    norms = clip_by_group(optimizers, 0.5, ALONE, given)
    clipped = set()
    for group in task.groups():
        norm = torch.cat([exact[name].flatten() for name in group.names]).norm()
        torch.testing.assert_close(norms[group.name].double(), norm, **CLOSE)
        for name in group.names:
            grad = dict(task.named_parameters())[name].grad
            assert grad is not None
            torch.testing.assert_close(grad.double(), exact[name] * min(1.0, 0.5 / norm), **CLOSE)
        clipped.add(bool(norm > 0.5))
    assert clipped == {factor > 1}


# --- averages


def test_swapped_weights_come_back() -> None:
    phase = toy_phase()
    task, optimizers = with_gradients(phase)
    ema = Ema(task, 0.9)
    ema.update(0, torch.tensor(0.0))
    averaged = task.enter.weight.detach().clone()
    take(optimizers)
    own = task.enter.weight.detach().clone()
    with pytest.raises(KeyError), ema.swapped():
        assert torch.equal(task.enter.weight, averaged)
        raise KeyError
    assert torch.equal(task.enter.weight, own) and not torch.equal(own, averaged)
    ema.take()
    assert torch.equal(task.enter.weight, averaged)


def test_no_average_is_the_weights() -> None:
    task, optimizers = with_gradients(toy_phase())
    ema = Ema(task, 0.0)
    take(optimizers)
    own = task.enter.weight.detach().clone()
    ema.update(3, torch.tensor(0.0))
    ema.take()
    assert torch.equal(task.enter.weight, own) and ema.tensors() == {}


# --- steps that are skipped


@contextmanager
def a_state(phase: Phase, bad: tuple[int, int]) -> Iterator[tuple[Any, TrainState]]:
    task, parallel = Toy(phase, bad=bad), Parallel("cpu")
    called = parallel.prepare(task, phase)
    task.train()
    yield called, TrainState(task, phase, parallel)


def one_step(called: Any, state: TrainState, phase: Phase, step: int) -> None:
    batches = list(batches_of(phase, step))
    draws = [Draw(5, "toy", batch.index, "cpu") for batch in batches]
    take_step(called, state, step, phase, ALONE, batches, draws)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_skipped_step_changes_nothing_that_is_trained(dtype: str) -> None:
    phase = toy_phase(dtype=dtype, micro_batch=4)
    with a_state(phase, (2, 4)) as (called, state):
        for step in range(6):
            before = {name: tensor.clone() for name, tensor in state.tensors().items()}
            one_step(called, state, phase, step)
            after = state.tensors()
            changed = {name for name in after if not torch.equal(before[name], after[name])}
            trained = {name for name in changed if not name.startswith("guard/") and "done" not in name}
            if step in (2, 3):
                assert not trained
                assert ("guard/scale" in changed) == (dtype == "float16")
            else:
                own = {f"model/{n}" for n, p in state.task.named_parameters() if p.requires_grad}
                assert own <= trained and any("/step" in name for name in trained)
                assert step == 0 or any(name.startswith("ema/") for name in trained)
        assert state.guard.read() == (2, 0)
