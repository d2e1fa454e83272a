"""What a run resumes from, at any number of processes; whatever ends a run, there is one that can be read."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hitsr_fast.train.config import CheckpointConfig, Phase
from hitsr_fast.train.guard import Guard
from hitsr_fast.train.optim import Ema, make_optimizers, optimizer_tensors
from hitsr_fast.train.parallel import Parallel
from hitsr_fast.train.task import Task

_FACTS = "train.json"  # beside what torch.distributed.checkpoint writes
_COMPLETE = re.compile(r"step-\d{8}")
_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError)


class SaveError(OSError):
    """A checkpoint could not be saved, and is not there; those before it are. `errno` tells why."""

    def __str__(self) -> str:
        return str(self.strerror)


class CheckpointMismatchError(ValueError):
    """A checkpoint is of another run."""


class TrainState:
    """All that a phase changes as it trains, but for the number of the step.

    Nothing in it depends on the process or their number, and nothing is random: draws and crops are functions
    of the step.

    Args:
        task: Prepared, see `Parallel.prepare`.
        phase: Of its optimisers.
        parallel: Where its shards are.
        fingerprint: Of all that the phase depends on.
    """

    def __init__(self, task: Task, phase: Phase, parallel: Parallel, fingerprint: str = "") -> None:
        self.task, self.fingerprint = task, fingerprint
        self.optimizers = make_optimizers(task, phase, parallel)
        self.ema = Ema(task, phase.optim.ema)
        self.guard = Guard(parallel.device, scaled=phase.precision.dtype == "float16")

    def tensors(self) -> dict[str, Tensor]:
        """Where all of it lies, by names: to be read and to be written over."""
        parts = {
            "model": self.task.state_dict(),
            "optimizer": optimizer_tensors(self.optimizers, self.task),
            "ema": self.ema.tensors(),
            "guard": self.guard.tensors(),
        }
        return {
            f"{part}/{name}": t.detach() for part, tensors in parts.items() for name, t in tensors.items()
        }


class Checkpoints:
    """Checkpoints of a phase: folders `step-00000100`, and a file `latest` with the name of the newest.

    One is written in the background, under another name; its files, then its folder are brought to the disk
    (fsync) before it has its name, and it has that before `latest` names it. So what has a name is whole.

    Args:
        folder: Made where it is not there; all processes see the same.
        config: How many are kept, and how often `due` says so.
        parallel: The processes, all of which make one and call the same in the same order.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, parallel: Parallel) -> None:
        self.folder, self.config, self._parallel = folder, config, parallel
        self._saved = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        # What is written in the background must not come between the messages of the steps.
        self._group = dist.new_group(backend="gloo") if parallel.world > 1 else None
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        if parallel.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("*.part"):
                _remove(left)
            self._name_newest()
        parallel.barrier()

    def steps(self) -> list[int]:
        """Of the checkpoints, newest first."""
        found = [path.name for path in self.folder.iterdir() if _COMPLETE.fullmatch(path.name)]
        return sorted((int(name.partition("-")[2]) for name in found), reverse=True)

    def due(self, step: int) -> bool:
        """Whether it is time for one, by steps or by the clock of this process."""
        by_steps = self.config.every > 0 and step % self.config.every == 0
        return by_steps or time.monotonic() - self._saved > 60.0 * self.config.minutes

    @property
    def failed(self) -> bool:
        """Whether this process knows of one that could not be saved."""
        return self._error is not None

    def save(self, state: TrainState, step: int) -> None:
        """Save in the background: training may go on as this returns, when all is copied.

        Raises:
            SaveError: The one before could not be saved.
        """
        self.wait()
        tensors = state.tensors()
        staged = DefaultStager(StagingOptions(False, False, False, False)).stage(tensors)
        assert isinstance(staged, dict)
        facts = {"step": step, "fingerprint": state.fingerprint}
        self._thread = threading.Thread(target=self._write, args=(staged, facts), daemon=True)
        self._thread.start()
        self._saved = time.monotonic()

    def wait(self) -> None:
        """Until what is being saved is on the disk.

        Raises:
            SaveError: It could not be saved.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        (failed,) = self._parallel.agreed(self.failed)
        if failed:
            raise self._error or SaveError(0, f"{self.folder}: another process could not save a checkpoint")

    def load(self, state: TrainState) -> int | None:
        """Restore the newest that can be read; its step, or None where there is none.

        What cannot be read is named in a line, and put aside as `step-00000100.unreadable`.

        Raises:
            CheckpointMismatchError: One has another fingerprint.
            ValueError: There are some, and none can be read.
        """
        steps = self.steps()
        reason = ""
        for step in steps:
            path = self._path(step)
            try:
                self._restore(path, state)
            except (CheckpointException, *_UNREADABLE) as error:
                if isinstance(error, CheckpointMismatchError):
                    raise
                reason = f"{path} cannot be read ({_cause(error)[0]})"
                self._parallel.barrier()
                if self._parallel.is_main:
                    print(f"hitsr-fast train: {reason}; falling back to the one before", flush=True)
                    _remove(path.with_suffix(".unreadable"))
                    path.rename(path.with_suffix(".unreadable"))
                    self._name_newest()
            else:
                return step
        if steps:
            raise ValueError(f"checkpoints: expected one that can be read, found none: {reason}")
        return None

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _restore(self, path: Path, state: TrainState) -> None:
        facts = json.loads((path / _FACTS).read_text())
        if facts["fingerprint"] != state.fingerprint:
            made, now = facts["fingerprint"], state.fingerprint
            raise CheckpointMismatchError(f"{path}: expected a checkpoint of {now!r}, found one of {made!r}")
        load(state.tensors(), checkpoint_id=path, process_group=self._group)

    # --- in the background

    def _write(self, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        path = self._path(facts["step"])
        part = path.with_suffix(".part")
        try:
            with _named(path):
                writer = FileSystemWriter(part, sync_files=True)
                save(tensors, storage_writer=writer, process_group=self._group)
                if self._parallel.is_main:
                    self._publish(part, path, facts)
        except SaveError as error:
            self._error = error
            if self._parallel.is_main:
                _remove(part)

    def _publish(self, part: Path, path: Path, facts: dict[str, Any]) -> None:
        _write_synced(part / _FACTS, json.dumps(facts))
        _sync(part)
        if path.exists():  # which another run of the same phase left
            old = path.with_suffix(".old.part")
            path.rename(old)
        part.rename(path)
        _sync(self.folder)
        self._name_newest()
        for step in self.steps()[self.config.keep :]:
            # First another name: half of a folder must not look like a whole one.
            gone = self._path(step).with_suffix(".old.part")
            self._path(step).rename(gone)
        for gone in self.folder.glob("*.old.part"):
            _remove(gone)

    def _name_newest(self) -> None:
        """Bring `latest` up to date; it goes with the last that can be read."""
        steps, latest = self.steps(), self.folder / "latest"
        if steps:
            part = self.folder / "latest.part"
            _write_synced(part, self._path(steps[0]).name)
            part.rename(latest)
        else:
            latest.unlink(missing_ok=True)
        _sync(self.folder)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of saving, as `SaveError`."""
    try:
        yield
    except (CheckpointException, *_UNREADABLE) as error:
        reason, number = _cause(error)
        text = f"{path.parent}: {path.name} could not be saved ({reason}); the checkpoints before it are kept"
        raise SaveError(number, text) from error


def _cause(error: BaseException) -> tuple[str, int]:
    """What went wrong, in a line, and its number if it is the system's; of several processes' the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    first: BaseException | None = error
    while first is not None and not isinstance(first, OSError):
        first = first.__cause__ or first.__context__
    if isinstance(first, OSError) and first.errno:
        return os.strerror(first.errno), first.errno
    return f"{type(error).__name__}: {error}".splitlines()[0], 0


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
