"""Random numbers that depend on what they are for, and on nothing else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hitsr_fast.transfer import to_device

_Words = npt.NDArray[np.uint64]


class Draw:
    """Draws of some samples: each number is a function of (seed, phase, stream, global sample index, place).

    So a sample's draws are the same whatever the batch, the process and the number of processes it is in, and
    a run that resumes has nothing random to restore. Global indices are `step * batch + position`, so that no
    two steps share them.

    Args:
        seed: Of the run.
        phase: Name of the phase, or of what else must have draws of its own.
        index: int64 `(B,)` on the CPU, global sample indices.
        device: Where the draws go.

    Example:
        >>> whole, part = (Draw(0, "phase", torch.tensor(index), "cpu") for index in ([3, 4], [4]))
        >>> bool(whole.uniform("noise", 5)[1:].equal(part.uniform("noise", 5)))
        True
    """

    def __init__(self, seed: int, phase: str, index: Tensor, device: torch.device | str) -> None:
        self.seed, self.phase, self.index, self.device = seed, phase, index, torch.device(device)

    def __getitem__(self, rows: slice | list[int]) -> Draw:
        """Those of some of the samples."""
        return Draw(self.seed, self.phase, self.index[rows], self.device)

    def uniform(self, stream: str, *shape: int) -> Tensor:
        """float32 `(B, *shape)` in [0, 1)."""
        return self._on_device(self._unit(stream, shape).astype(np.float32))

    def normal(self, stream: str, *shape: int) -> Tensor:
        """float32 `(B, *shape)` of mean 0 and variance 1 (Box and Muller, 1958)."""
        radius = np.sqrt(-2.0 * np.log1p(-self._unit(stream + "/radius", shape)))
        angle = self._unit(stream + "/angle", shape) * (2.0 * math.pi)
        return self._on_device((radius * np.cos(angle)).astype(np.float32))

    def integers(self, stream: str, high: int, *shape: int) -> Tensor:
        """int64 `(B, *shape)` in [0, high), high at most 2 ** 24."""
        return self._on_device((self._unit(stream, shape) * high).astype(np.int64))

    def seeds(self, stream: str) -> list[int]:
        """A seed of a sequence of draws, one a sample, below 2 ** 63."""
        return [int(word) for word in self._words(stream, ()) >> np.uint64(1)]

    def _unit(self, stream: str, shape: Sequence[int]) -> npt.NDArray[np.float64]:
        # 24 bits, which float32 holds: rounded to it, no number becomes 1.
        words: npt.NDArray[np.float64] = (self._words(stream, shape) >> np.uint64(40)).astype(np.float64)
        return words * 2.0**-24

    def _words(self, stream: str, shape: Sequence[int]) -> _Words:
        key = hashlib.blake2b(f"{self.seed}/{self.phase}/{stream}".encode(), digest_size=8).digest()
        samples = _mixed(self.index.numpy().astype(np.uint64) ^ np.frombuffer(key, np.uint64))
        places = np.arange(math.prod(shape), dtype=np.uint64)
        return _mixed(samples[:, None] + places * _GOLDEN).reshape(len(samples), *shape)

    def _on_device(self, values: npt.NDArray[np.float32] | npt.NDArray[np.int64]) -> Tensor:
        return to_device(torch.from_numpy(values), self.device)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(words: _Words) -> _Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), after one addition of its constant."""
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: _Words = words ^ (words >> np.uint64(31))
    return mixed
