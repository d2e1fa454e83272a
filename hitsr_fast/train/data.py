"""Which samples a process takes at a step, and their crops, made ahead by worker processes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hitsr_fast.data.sources import open_source, open_sources
from hitsr_fast.train.config import DataConfig
from hitsr_fast.train.prefetch import Workers
from hitsr_fast.train.server import start_server
from hitsr_fast.train.task import Batch

__all__ = [
    "Crops",
    "IndexSampler",
    "Loader",
    "Source",
    "memory_of",
    "name_skipped",
    "open_source",
    "open_sources",
]


class Source(Protocol):
    """Photos, wherever they lie.

    Attributes:
        digest: Of the names, sizes, heads and tails of the photos; part of a phase's fingerprint.
        side: Of its crops.
        skipped: Reason by file, of the photos that are left out.
    """

    digest: str
    side: int
    skipped: dict[str, str]

    def crop(self, seed: int, phase: str, index: int, size: int) -> Tensor:
        """uint8 `(3, size, size)`, a function of the arguments and the photos; `size` at most `side`."""

    def newly_skipped(self) -> dict[str, str]:
        """Of `skipped` what no call has given before."""


class IndexSampler:
    """Which samples a process takes at a step: arithmetic, without a state.

    Of the global indices `step * batch` to `(step + 1) * batch - 1` rank r takes every `world`-th from the
    r-th on, so that all processes together take the same at any number of processes.

    Args:
        batch: Samples a step, over all processes.
        micro_batch: Samples that a process takes at once; 0 takes its whole share.
        rank, world: Of the process, and number of processes.

    Raises:
        ValueError: the batch cannot be split evenly.

    Example:
        >>> IndexSampler(8, 2, rank=1, world=2).micro_batches(step=10)
        [[81, 83], [85, 87]]
    """

    def __init__(self, batch: int, micro_batch: int, rank: int, world: int) -> None:
        if batch % world:
            raise ValueError(f"batch: expected a multiple of the {world} processes, found {batch}")
        share = batch // world
        if micro_batch and share % micro_batch:
            raise ValueError(
                f"parallel.micro_batch: expected a divisor of a process's share, "
                f"{batch} / {world} = {share}, found {micro_batch}"
            )
        self.batch, self.micro_batch, self.rank, self.world = batch, micro_batch or share, rank, world

    def micro_batches(self, step: int) -> list[list[int]]:
        """Global indices of the samples of this process, a list a micro-batch."""
        first = step * self.batch
        share = list(range(first + self.rank, first + self.batch, self.world))
        return [share[at : at + self.micro_batch] for at in range(0, len(share), self.micro_batch)]


class Loader:
    """The micro-batches of a phase's steps.

    Args:
        source: Of the crops.
        sampler: Says which samples a step has.
        config: Of the data: `workers` and `prefetch`.
        seed, phase: Key of the crops, beside their indices.
        device: Where the batches will go: for CUDA they lie in pinned memory.

    Attributes:
        waited: Seconds for which the caller has waited; set it to 0 to count anew.
        skipped: Reason by file, of the photos that are left out. Each is also named once on stderr.
    """

    def __init__(
        self,
        source: Source,
        sampler: IndexSampler,
        config: DataConfig,
        *,
        seed: int,
        phase: str,
        device: torch.device | str,
    ) -> None:
        self.source, self.sampler, self.config = source, sampler, config
        self.seed, self.phase, self.device = seed, phase, torch.device(device)
        self.waited = 0.0
        if config.workers:
            start_server()
        if sampler.rank == 0:
            name_skipped(source)
        else:
            source.newly_skipped()  # the first process names them

    @property
    def skipped(self) -> dict[str, str]:
        """Reason by file, of the photos that are left out."""
        return self.source.skipped

    def steps(self, first_step: int, last_step: int) -> Generator[list[Batch], None, None]:
        """The micro-batches of each step from `first_step` to before `last_step`, uint8 on the CPU.

        Any step can be the first: nothing is made for those before it. Workers end when the iterator does.
        """
        with contextlib.closing(self._crops(first_step, last_step)) as crops:
            for step in range(first_step, last_step):
                started = time.perf_counter()
                batches = [
                    Batch(next(crops), torch.tensor(indices)) for indices in self.sampler.micro_batches(step)
                ]
                self.waited += time.perf_counter() - started
                name_skipped(self.source)
                yield batches

    def _crops(self, first_step: int, last_step: int) -> Generator[Tensor, None, None]:
        """Those of all micro-batches, one after the other."""
        job = Crops(self.source, self.sampler, self.seed, self.phase, first_step, last_step)
        pinned = self.device.type == "cuda"
        if not self.config.workers:
            for item in range(job.items):
                crops = torch.empty(job.shape, dtype=torch.uint8, pin_memory=pinned)
                job.fill(item, crops.numpy())
                yield crops
            return
        a_step = self.sampler.batch // self.sampler.world // self.sampler.micro_batch
        ahead = self.config.prefetch * a_step
        workers = Workers(job, self.config.workers, ahead, pinned=pinned, found=self.source.skipped)
        try:
            yield from workers
        finally:
            workers.close()


@dataclass
class Crops:
    """A `Job`: the crops of the micro-batches of some steps."""

    source: Source
    sampler: IndexSampler
    seed: int
    phase: str
    first_step: int
    last_step: int

    @property
    def _a_step(self) -> int:
        return self.sampler.batch // self.sampler.world // self.sampler.micro_batch

    @property
    def items(self) -> int:
        return max(0, self.last_step - self.first_step) * self._a_step

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.sampler.micro_batch, 3, self.source.side, self.source.side)

    def fill(self, item: int, out: npt.NDArray[np.uint8]) -> None:
        step, part = divmod(item, self._a_step)
        indices = self.sampler.micro_batches(self.first_step + step)[part]
        for row, index in enumerate(indices):
            out[row] = self.source.crop(self.seed, self.phase, index, self.source.side).numpy()

    def skipped(self) -> dict[str, str]:
        return self.source.newly_skipped()


def memory_of(config: DataConfig) -> int:
    """Bytes of decoded photos that each process of a rank holds: its workers, and the run's own."""
    return (config.memory_mib << 20) // (config.workers + 1)


def name_skipped(source: Source) -> None:
    """Name on stderr, in a line each, the photos that were found to be of no use since the last call."""
    for file, reason in source.newly_skipped().items():
        print(f"hitsr-fast train: photo left out: {file}: {reason}", file=sys.stderr, flush=True)
