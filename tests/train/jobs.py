"""What one of several processes does in the tests of the trainer."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hitsr_fast.train.config import Phase
from hitsr_fast.train.trainer import Stopped
from tests.train.toy import Batch, Draw, Lines, Losses, Toy, train_toy, weights

Steps = list[tuple[int, dict[str, Any]]]


class Run(NamedTuple):
    """What `fit` did."""

    steps: Steps  # as logged: number, and all means of it
    weights: dict[str, Tensor]
    seen: list[list[int]]
    lines: list[dict[str, Any]]
    codes: list[list[int]]
    code: int  # of the exit

    @property
    def losses(self) -> list[float]:
        return [values["loss"] for _, values in self.steps]


class Stopping(Toy):
    """Gets a signal in its step of that number, from 1."""

    stop = (0, signal.SIGTERM)

    def forward(self, batch: Batch, draw: Draw) -> Losses:
        if self.training and int(batch.index[0]) // self.phase.batch + 1 == self.stop[0]:
            os.kill(os.getpid(), self.stop[1])
        return super().forward(batch, draw)


def run(
    folder: Path,
    phase: Phase,
    *,
    stop: int = 0,
    number: int = signal.SIGTERM,
    ranks: tuple[int, ...] = (0, 1, 2, 3),
    bad: tuple[int, int] = (0, 0),
    **settings: Any,
) -> Run:
    """`train_toy`; `stop` is the step in which processes `ranks` get a signal."""
    task, log, code = Stopping(phase, bad=bad), Lines(), 0
    if int(os.environ.get("RANK", 0)) in ranks:
        task.stop = (stop, signal.Signals(number))
    try:
        train_toy(folder, phase, task=task, log=log, **settings)
    except Stopped as stopped:
        code = int(str(stopped.code))
    for _, values in log.steps:
        del values["waited"]
    left = weights(task) if code == 0 else {}
    return Run(log.steps, left, task.seen, log.lines, log.codes, code)


def run_all(*jobs: tuple[Path, Phase, dict[str, Any]]) -> list[Run]:
    """One after the other, in the same processes."""
    return [run(folder, phase, **settings) for folder, phase, settings in jobs]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
