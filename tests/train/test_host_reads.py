"""A step of training queues its work and waits for nothing, on a device that has no values to wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hitsr_fast.train.checkpoint import TrainState
from hitsr_fast.train.config import ParallelConfig, Phase, PrecisionConfig, TaskConfig
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.parallel import Parallel
from hitsr_fast.train.tasks import TASKS
from hitsr_fast.train.trainer import take_step
from tests.train.fake_gpu import DEVICE, WAITS, FakeGpu, HostWaitsError, no_autocast
from tests.train.task_checks import (
    AUTOENCODE,
    DATA,
    DECODE,
    NEXT_SCALE,
    OPTIM,
    TOKENIZE,
    samples,
    whole_model,
)

MUON = replace(OPTIM, muon_lr=0.02)
CONFIGS: dict[str, TaskConfig] = {
    "autoencode": AUTOENCODE,
    "tokenize": replace(TOKENIZE, revive_below=0.1, revive_every=1),
    "adversarial": replace(TOKENIZE, gan_weight=0.1),
    "next_scale": NEXT_SCALE,
    "decode": replace(DECODE, top_k=1),
}


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with no_autocast(), FakeGpu() as mode:
        yield mode


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_training_waits_for_nothing(name: str, gpu: FakeGpu) -> None:
    """Pairs, loss, backward, clipping, optimisers and moving average, twice, each of two micro-batches."""
    gpu.strict = False
    config = CONFIGS[name]
    phase = Phase(
        name="phase",
        task=config,
        batch=4,
        optim=MUON,
        precision=PrecisionConfig(dtype="float32"),
        parallel=ParallelConfig(micro_batch=2),
    )
    task = TASKS[config.kind](whole_model(), phase, DATA, DEVICE)
    task.train()
    parallel = Parallel(DEVICE)
    called = parallel.prepare(task, phase)
    state = TrainState(task, phase, parallel)
    gpu.strict = True
    for step in range(2):
        batches = [samples(4 * step + first, 2) for first in (0, 2)]
        draws = [Draw(0, phase.name, batch.index, DEVICE) for batch in batches]
        means, counts = take_step(called, state, step, phase, parallel, batches, draws)
        assert all(value.is_meta for value in [*means.values(), *counts.values()])


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_what_waits_is_found(wait: Callable[[Tensor], object], gpu: FakeGpu) -> None:
    x = torch.zeros(3, device=DEVICE)
    with pytest.raises((HostWaitsError, RuntimeError)):
        wait(x)
