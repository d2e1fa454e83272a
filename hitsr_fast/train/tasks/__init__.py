"""What a phase can learn: `TASKS`, by the kind of their configuration."""

from __future__ import annotations

from hitsr_fast.train.tasks.autoencode import Autoencode
from hitsr_fast.train.tasks.base import HitTask
from hitsr_fast.train.tasks.decode import Decode
from hitsr_fast.train.tasks.next_scale import NextScale
from hitsr_fast.train.tasks.tokenize import Tokenize

# Each is made as `TASKS[kind](model, phase, data, device)`.
TASKS: dict[str, type[HitTask]] = {
    "autoencode": Autoencode,
    "tokenize": Tokenize,
    "next_scale": NextScale,
    "decode": Decode,
}

__all__ = ["TASKS", "Autoencode", "Decode", "HitTask", "NextScale", "Tokenize"]
