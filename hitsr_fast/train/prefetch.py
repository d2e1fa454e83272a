"""Arrays made ahead by worker processes, and taken in order.

Not by `torch.utils.data.DataLoader`: its workers end at Ctrl-C, before the step that a run still finishes; it
takes a number from the global generator; and a worker that dies raises in whatever runs just then.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import signal
import traceback
from collections.abc import Iterator
from multiprocessing import util
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hitsr_fast.data.crops import NoPhotosError
from hitsr_fast.train.server import start_server

_Array = npt.NDArray[np.uint8]


class Job(Protocol):
    """What is made; goes to the workers by pickle."""

    @property
    def items(self) -> int:
        """How many arrays there are."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an array, whose dtype is uint8."""

    def fill(self, item: int, out: _Array) -> None:
        """Make an array."""

    def skipped(self) -> dict[str, str]:
        """Files that were left out since the last call, each with the reason."""


class Workers:
    """Makes the arrays of a job in order, in processes of their own.

    Worker w makes the arrays w, w + workers, ... into a ring of `ahead` arrays that it shares with this
    process, and waits while it is full. Workers leave signals to this process and end when it does, or when
    the iterator is closed.

    Args:
        job: Of the arrays.
        workers: How many processes; at least 1.
        ahead: Arrays that each makes ahead.
        pinned: Whether the arrays go to pinned memory.
        found: Is given what workers left out, before the array in which they found it.
    """

    def __init__(self, job: Job, workers: int, ahead: int, *, pinned: bool, found: dict[str, str]) -> None:
        start_server()
        self._context = multiprocessing.get_context("forkserver")
        self._job, self._ahead, self._pinned, self._found = job, ahead, pinned, found
        self._workers: list[_Worker] = []
        self.close = util.Finalize(self, _end, (self._workers,), exitpriority=100)
        for number in range(workers):
            self._workers.append(self._started(number, workers))

    def _started(self, number: int, workers: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        memory = self._context.RawArray(ctypes.c_uint8, self._ahead * math.prod(self._job.shape))
        process = self._context.Process(
            target=_work, args=(self._job, number, workers, self._ahead, memory, theirs), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, ours, _ring(memory, self._ahead, self._job))

    def __iter__(self) -> Iterator[Tensor]:
        workers = len(self._workers)
        for item in range(self._job.items):
            turn, number = divmod(item, workers)
            message = self._workers[number].message()
            if message is None and turn == 0:  # a signal came before it knew that it leaves them to us
                self._workers[number] = self._started(number, workers)
                message = self._workers[number].message()
            if message is None:
                process = self._workers[number].process
                process.join(1.0)
                raise RuntimeError(
                    f"a data worker ended with exit code {process.exitcode}; if it was killed for want of "
                    "memory, lower data.workers or data.prefetch"
                )
            if isinstance(message, Exception):
                raise message
            self._found.update(message)
            array = torch.empty(self._job.shape, dtype=torch.uint8, pin_memory=self._pinned)
            array.numpy()[...] = self._workers[number].ring[turn % self._ahead]
            if item + self._ahead * workers < self._job.items:
                self._workers[number].free()
            yield array


class _Worker(NamedTuple):
    process: Any
    connection: Connection
    ring: _Array

    def message(self) -> dict[str, str] | Exception | None:
        """What it says of its next array, which then lies in the ring; None if it is no more."""
        try:
            message: dict[str, str] | Exception = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return None
        return message

    def free(self) -> None:
        """One more place in the ring is free."""
        with contextlib.suppress(BrokenPipeError):  # it is no more, which its next message will show
            self.connection.send_bytes(b"free")


def _ring(memory: Any, ahead: int, job: Job) -> _Array:
    return np.frombuffer(memory, np.uint8).reshape(ahead, *job.shape)


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        worker.process.join(5.0)
        if worker.process.is_alive():  # it reads a file that does not come
            worker.process.kill()
            worker.process.join()


def _work(job: Job, first: int, stride: int, ahead: int, memory: Any, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    ring = _ring(memory, ahead, job)
    try:
        for turn, item in enumerate(range(first, job.items, stride)):
            if turn >= ahead:
                connection.recv_bytes()
            connection.send(_made(job, item, ring[turn % ahead]))
    except (EOFError, ConnectionError):
        return  # the run is over


def _made(job: Job, item: int, out: _Array) -> dict[str, str] | Exception:
    """What was left out, or the error, which the run's process raises."""
    try:
        job.fill(item, out)
        return job.skipped()
    except NoPhotosError as error:
        return error
    except Exception:
        return RuntimeError(f"in a data worker:\n{traceback.format_exc()}")
