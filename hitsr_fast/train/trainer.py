"""The only loop: `fit` trains a task through a phase."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from types import FrameType
from typing import cast

import torch
from torch import Tensor, nn

from hitsr_fast.train.checkpoint import Checkpoints, TrainState
from hitsr_fast.train.config import Phase
from hitsr_fast.train.data import IndexSampler, Loader, Source
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.guard import IN_A_ROW
from hitsr_fast.train.log import Log
from hitsr_fast.train.optim import clip_by_group, learning_rate, take_gradients
from hitsr_fast.train.parallel import Parallel
from hitsr_fast.train.task import Batch, Losses, Task
from hitsr_fast.transfer import to_device

_HELD_OUT_BATCHES, _HELD_OUT_SIZE = 2, 16  # of samples in an evaluation
_PICTURES = 8  # rows of an image grid


class Stopped(SystemExit):
    """A signal asked a run to stop; its step is finished and saved. Exit code 75 (EX_TEMPFAIL): run again."""

    def __init__(self) -> None:
        super().__init__(os.EX_TEMPFAIL)


def fit(
    task: Task,
    phase: Phase,
    loader: Loader,
    held_out: Source | None,
    parallel: Parallel,
    checkpoints: Checkpoints,
    log: Log,
    *,
    seed: int,
    fingerprint: str,
) -> None:
    """Train a task through a phase, from its newest checkpoint if it has one.

    Every step is a function of its number and of the state that a checkpoint holds. So an interrupted run
    gives what an undisturbed one gives: bit for bit with the same number of processes (one or two), else to
    the order of sums.

    Args:
        task: On the device of `parallel`; has what the phase yields afterwards: its averaged weights.
        phase: What to do.
        loader: Of the training samples of this process.
        held_out: Of the samples of evaluations and pictures; None leaves those out.
        parallel: The processes.
        checkpoints: Of this phase.
        log: Of this phase; what the first process's says is done by all.
        seed: Of the draws.
        fingerprint: Of all that the phase depends on; a checkpoint with another is refused.

    Raises:
        Stopped: SIGTERM or SIGINT came; on all processes after the same step.
        FloatingPointError: Ten steps in a row had a loss or gradient that is not finite. It shows at the next
            line of the log or checkpoint: until then no value is read back.
        SaveError: A checkpoint could not be saved.
        CheckpointMismatchError: The checkpoint is of another run.
    """
    steps = phase.schedule.steps
    if not checkpoints.steps():
        _start(task, phase, loader, parallel, log, seed)
    parallel.share(task)
    called = parallel.prepare(task, phase)
    state = TrainState(task, phase, parallel, fingerprint)
    step = checkpoints.load(state) or 0
    if step:
        log.line("resumed", step=step)
    task.train()
    counts: dict[str, Tensor] = {}  # since the last line of the log, of this process
    known = state.guard.read()[0]
    with _signals() as signalled, _closing(loader.steps(step, steps)) as batches:
        for micro_batches in batches:
            draws = [Draw(seed, phase.name, batch.index, parallel.device) for batch in micro_batches]
            means, new = take_step(called, state, step, phase, parallel, micro_batches, draws)
            counts = {name: counts[name] + n if name in counts else n for name, n in new.items()}
            step += 1
            # The first process's clock and log decide for all; the signal may have come to any.
            main, last = parallel.is_main, step == steps
            stop, save, say, evaluate, show = parallel.agreed(
                bool(signalled) or checkpoints.failed,
                main and (last or checkpoints.due(step)),
                main and (last or step % log.config.every == 0),
                main and (last or _every(log.config.eval_every, step)),
                main and (last or _every(log.config.images_every, step)),
            )
            rate, waited, loader.waited = learning_rate(step - 1, phase.schedule), loader.waited, 0.0
            told = parallel.total(counts) if say else {}
            counts = {} if say else counts
            log.step(step, means, told, lr=phase.optim.lr * rate, waited=waited)
            if say or save or stop:
                known = _check_finite(state, phase, step, log, known)
            if held_out is not None and (evaluate or show):
                _look(state, phase, held_out, parallel, log, step, seed, evaluate=evaluate, show=show)
            if save or stop:
                checkpoints.save(state, step)
            if stop:
                checkpoints.wait()
                log.line("stopped", step=step)
                raise Stopped
    checkpoints.wait()
    state.ema.take()
    parallel.release(task)


def take_step(
    called: nn.Module,
    state: TrainState,
    step: int,
    phase: Phase,
    parallel: Parallel,
    micro_batches: Sequence[Batch],
    draws: Sequence[Draw],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One step, which waits for nothing on the device.

    Args:
        called: What `Parallel.prepare` gave.
        state: Of which all but the step changes.
        step: Its number, from 0.
        phase: With rates and bounds.
        parallel: The processes.
        micro_batches, draws: Of this process.

    Returns:
        Means over the samples of all processes, and counts of this process's.
    """
    optimizers, guard = state.optimizers, state.guard
    scale = None if guard.scale is None else guard.scale.clone()
    means: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    share = 1.0 / len(micro_batches)
    for number, (batch, draw) in enumerate(zip(micro_batches, draws, strict=True), 1):
        with parallel.accumulating(number == len(micro_batches)):
            images = to_device(batch.images, parallel.device)
            losses: Losses = called(Batch(images, batch.index), draw)
            total = losses.total * share
            (total if scale is None else total * scale).backward()
        for name, value in {"loss": losses.total.detach(), **losses.means}.items():
            means[name] = means[name] + value * share if name in means else value * share
        for name, count in losses.counts.items():
            counts[name] = counts[name] + count if name in counts else count
    take_gradients(optimizers, state.task)
    norms = clip_by_group(optimizers, phase.optim.clip, parallel, scale)
    means = parallel.mean(means)
    skip = guard.check(step, means["loss"], norms.values())
    rate = learning_rate(step, phase.schedule)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
    state.task.zero_grad()
    state.task.after_step(step)
    state.ema.update(step, skip)
    means |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
    if scale is not None:
        means["loss_scale"] = scale
    return means, counts


def _start(task: Task, phase: Phase, loader: Loader, parallel: Parallel, log: Log, seed: int) -> None:
    """What the task does before its first step, on the first process: the samples are those of any number."""
    if not parallel.is_main:
        return
    sampler = IndexSampler(phase.batch, loader.sampler.micro_batch, 0, 1)
    whole = Loader(
        loader.source, sampler, loader.config, seed=loader.seed, phase=loader.phase, device=loader.device
    )
    with torch.no_grad(), _closing(whole.steps(0, phase.schedule.steps)) as steps:
        numbers = task.start((_on_device(b, parallel) for batches in steps for b in batches), seed)
    log.line("prepared", step=0, **numbers)


@torch.no_grad()
def _look(
    state: TrainState,
    phase: Phase,
    held_out: Source,
    parallel: Parallel,
    log: Log,
    step: int,
    seed: int,
    *,
    evaluate: bool,
    show: bool,
) -> None:
    """Numbers and pictures of the averaged weights on held-out samples, by the first process."""
    task, name = state.task, f"{phase.name}/held-out"
    with state.ema.swapped(), parallel.whole(task):
        task.eval()
        if parallel.is_main:
            batches = [_on_device(batch, parallel) for batch in _held_out(held_out, seed, name)]
            draws = [Draw(seed, name, batch.index, parallel.device) for batch in batches]
            if evaluate:
                log.line("held_out", step=step, **task.evaluate(batches, draws))
            if show:
                first = Batch(batches[0].images[:_PICTURES], batches[0].index[:_PICTURES])
                columns = task.pictures(first, draws[0][:_PICTURES])
                if columns:
                    log.images(step, columns)
        task.train()
    parallel.barrier()
    log.restart_clock()


def _held_out(source: Source, seed: int, name: str) -> Iterator[Batch]:
    """The same samples each time."""
    for first in range(0, _HELD_OUT_BATCHES * _HELD_OUT_SIZE, _HELD_OUT_SIZE):
        index = range(first, first + _HELD_OUT_SIZE)
        crops = [source.crop(seed, name, i, source.side) for i in index]
        yield Batch(torch.stack(crops), torch.tensor(index))


def _on_device(batch: Batch, parallel: Parallel) -> Batch:
    return Batch(to_device(batch.images, parallel.device), batch.index)


def _check_finite(state: TrainState, phase: Phase, step: int, log: Log, known: int) -> int:
    """Say what was skipped, and stop the run where it was ten steps in a row; the number of all so far."""
    total, tenth = state.guard.read()
    if total > known:
        log.line("skipped", step=step, steps=total - known, reason="loss or gradient not finite")
    if tenth:
        first, behind = (tenth - IN_A_ROW) * phase.batch, tenth * phase.batch
        raise FloatingPointError(
            f"{phase.name}: the loss or gradient of {IN_A_ROW} steps in a row is not finite, "
            f"the last of them step {tenth} with the samples {behind - phase.batch} to {behind - 1} "
            f"(all of them: {first} to {behind - 1}); the weights are those before"
        )
    return total


def _closing(steps: Iterator[list[Batch]]) -> contextlib.closing[Generator[list[Batch], None, None]]:
    """A context that ends the loader's workers."""
    return contextlib.closing(cast("Generator[list[Batch], None, None]", steps))


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """In this context SIGTERM and SIGINT end nothing; which came is in the list."""
    came: list[int] = []

    def take(number: int, _frame: FrameType | None) -> None:
        came.append(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        before = {number: signal.signal(number, take) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
