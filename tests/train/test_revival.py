"""Dead codes: which are replaced, by what, and that processes agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hitsr_fast.train.task import Batch
from hitsr_fast.train.tasks import revival
from hitsr_fast.train.tasks.revival import CodeRevival, searched_rows
from tests.tolerances import TOLERANCES
from tests.train import task_checks as checks
from tests.train.task_checks import BATCH, CONFIG, TOKENIZE, make

CLOSE = TOLERANCES["float32_reordered"]._asdict()
DEAD = [3, 17, 40]


def task_with_dead_codes(every: int = 1) -> checks.HitTask:
    """Some codes are so far off that no token takes them."""
    task = make(TOKENIZE, revive_below=1e-9, revive_every=every)
    with torch.no_grad():
        task.model.tokenizer.quantize.codebook[DEAD] = 100.0
    return task


def step(task: checks.HitTask, number: int, parts: int = 1) -> Tensor:
    """One step of some micro-batches; the codebook after it."""
    batch = checks.samples(number * BATCH)
    for rows in (slice(part, None, parts) for part in range(parts)):
        own = Batch(batch.images[rows], batch.index[rows])
        task(own, checks.draw_of(own))
    task.after_step(number)
    return task.model.tokenizer.quantize.codebook.detach().clone()


def test_searched_rows_are_what_the_tokens_are_nearest_to() -> None:
    """Each token is the code nearest to its row."""
    task = make(TOKENIZE)
    quantizer = task.model.tokenizer.quantize
    with torch.no_grad():
        latents = task.latents(task.levels(checks.images_of(checks.samples())))
        indices, _ = quantizer.tokenize(latents)
        rows = searched_rows(quantizer, range(3), latents, indices)
    assert rows.shape == (BATCH, CONFIG.tokenizer.pyramid.num_tokens, CONFIG.tokenizer.code_dim)
    nearest = torch.cdist(rows.double(), quantizer.codebook.double()).argmin(-1)
    assert torch.equal(nearest, indices)


def test_codes_that_nobody_takes_become_residuals_of_the_step() -> None:
    task = task_with_dead_codes()
    before = task.model.tokenizer.quantize.codebook.detach().clone()
    batch = checks.samples(0)
    counts = task(batch, checks.draw_of(batch)).counts["codes"].sum(0)
    task.after_step(0)
    after = task.model.tokenizer.quantize.codebook.detach()
    dead = counts == 0
    assert set(DEAD) <= set(dead.nonzero().flatten().tolist())
    assert torch.equal((after != before).any(1), dead), "those, and no others"
    old = make(TOKENIZE)
    with torch.no_grad():
        quantizer = old.model.tokenizer.quantize
        quantizer.codebook.copy_(before)
        latents = old.latents(old.levels(checks.images_of(batch)))
        rows = searched_rows(quantizer, range(3), latents, quantizer.tokenize(latents).indices)
    new = after[dead]
    distance = torch.cdist(new.double(), rows.flatten(0, 1).double()).min(1)
    torch.testing.assert_close(distance.values.float(), torch.zeros(len(new)), **CLOSE)
    sources = distance.indices // rows.shape[1]
    assert sources.unique().numel() == min(len(new), BATCH), "of as many images as there are"


def test_the_next_step_takes_them() -> None:
    task = task_with_dead_codes()
    step(task, 0)
    batch = checks.samples(0)
    counts = task(batch, checks.draw_of(batch)).counts["codes"].sum(0)
    assert counts[DEAD].sum() > 0


def test_it_is_time_every_so_many_steps() -> None:
    """What was taken in between counts, and the count begins anew; it is part of a checkpoint."""
    task = task_with_dead_codes(every=3)
    start = task.model.tokenizer.quantize.codebook.detach().clone()
    assert torch.equal(step(task, 0), start) and torch.equal(step(task, 1), start)
    used = task.state_dict()["revival.used"]
    assert used.sum() == 2 * BATCH * CONFIG.tokenizer.pyramid.num_tokens
    seen = used > 0
    after = step(task, 2)
    changed = (after != start).any(1)
    assert changed[DEAD].all() and not (changed & seen).any()
    assert task.state_dict()["revival.used"].sum() == 0


def test_micro_batches_and_resuming_change_nothing() -> None:
    whole, parts, resumed = (task_with_dead_codes(every=2) for _ in range(3))
    step(whole, 0), step(parts, 0, parts=3)
    resumed.load_state_dict(whole.state_dict())
    expected = step(whole, 1)
    assert torch.equal(step(parts, 1, parts=2), expected)
    assert torch.equal(step(resumed, 1), expected)


def test_processes_replace_by_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has every other sample; counts and rows are of both, whoever comes first."""
    expected = step(task_with_dead_codes(), 0)
    batch, tasks = checks.samples(0), [task_with_dead_codes() for _ in range(2)]
    for rank, task in enumerate(tasks):
        own = Batch(batch.images[rank::2], batch.index[rank::2])
        task(own, checks.draw_of(own))
    states: list[CodeRevival] = [task.revival for task in tasks]  # type: ignore[misc]
    counts = [torch.stack(state._counts).sum(0) for state in states]
    found = [[torch.cat(list(kind)) for kind in zip(*state._found, strict=True)] for state in states]
    gathered = {tuple(part.shape): [found[0][i], found[1][i]] for i, part in enumerate(found[0])}
    monkeypatch.setattr(revival, "_sum_over_processes", lambda own: own.copy_(sum(counts)))
    monkeypatch.setattr(revival, "_of_all_processes", lambda own: torch.cat(gathered[tuple(own.shape)]))
    for task in tasks:
        task.after_step(0)
        assert torch.equal(task.model.tokenizer.quantize.codebook, expected)


def test_without_it_nothing_is_counted() -> None:
    task = make(TOKENIZE)
    before = task.model.tokenizer.quantize.codebook.detach().clone()
    assert torch.equal(step(task, 0), before)
    assert not any("revival" in name for name in task.state_dict())
