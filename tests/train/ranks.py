"""Real processes that train together, as `torchrun` starts them, without the seconds each takes to import."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "tests.train.toy"]


class RankError(AssertionError):
    """A process failed; the text is its traceback."""


class Ranks:
    """`function(*args)` in each of `world` processes; a function of a module that imports quickly."""

    def __init__(self, world: int, function: Callable[..., Any], *args: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        port = _free_port()
        self.processes: list[ForkServerProcess] = []
        for rank in range(world):
            path = Path(self._folder.name) / str(rank)
            process = _server().Process(
                target=_one, args=(path, rank, world, port, function, args), daemon=True
            )
            process.start()
            self.processes.append(process)

    def kill(self, number: int = signal.SIGKILL, ranks: slice = slice(None)) -> None:
        """Send a signal to those that still run."""
        for process in self.processes[ranks]:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Exit codes; -9 is that of SIGKILL."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                self.kill()
                raise RankError(f"still running after {seconds} s")
        return [int(process.exitcode or 0) for process in self.processes]

    def results(self) -> list[Any]:
        """What the function gave in each; RankError where it raised."""
        self.wait()
        found = []
        for rank in range(len(self.processes)):
            path = Path(self._folder.name) / str(rank)
            kind, value = pickle.loads(path.read_bytes()) if path.exists() else ("error", "died")
            if kind == "error":
                raise RankError(f"process {rank}: {value}")
            found.append(value)
        return found


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` gives in each of `world` processes."""
    return Ranks(world, function, *args).results()


def _one(
    path: Path, rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        result = ("result", function(*args))
    except Exception:
        result = ("error", traceback.format_exc())
    path.write_bytes(pickle.dumps(result))
    if dist.is_initialized() and result[0] == "result":
        dist.destroy_process_group()


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
