"""What `--plan` counts, against formulas and against a real forward and backward pass."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hitsr_fast.models import PRESETS, HitVar
from hitsr_fast.train.data import IndexSampler
from hitsr_fast.train.parallel import Parallel, local
from hitsr_fast.train.plan import (
    CHIPS,
    OF_FLOPS,
    OF_LINK,
    OF_MEMORY,
    forward_backward,
    plan,
    shapes_only,
    side_of,
    step_flops,
    table,
)
from hitsr_fast.train.recipes import load_recipe
from tests.train.micro import CONFIG, micro_recipe


def test_counts_are_those_of_the_model(tmp_path: Path) -> None:
    plans = {one.name: one for one in plan(micro_recipe(tmp_path, steps=7), 1)}
    assert list(plans) == ["autoencode", "tokenize", "next_scale", "decode"]
    model = HitVar(CONFIG)
    transformer = sum(p.numel() for p in model.transformer.parameters())
    found = plans["next_scale"]
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.trained == transformer
    assert found.gradients == 4 * transformer
    assert found.optimizer == 3 * found.gradients  # two moments and the averaged weights
    assert (found.steps, found.micro_batch, found.accumulation) == (7, 4, 1)
    assert found.communication == 0
    tokens = CONFIG.tokenizer.pyramid.num_tokens
    matrices = sum(p.numel() for p in model.transformer.blocks.parameters() if p.ndim == 2)
    recipe = micro_recipe(tmp_path)
    assert (
        found.flops
        == step_flops(recipe, recipe.phases[2])
        == 2 * step_flops(recipe, replace(recipe.phases[2], batch=2))
    )
    assert found.flops > 6 * 4 * tokens * matrices / 2  # the modulation is of an image, not of a token


def test_what_is_sharded_and_sent(tmp_path: Path) -> None:
    recipe = micro_recipe(tmp_path)
    ddp, fsdp = (
        plan(
            replace(
                recipe,
                phases=tuple(replace(p, parallel=replace(p.parallel, strategy=kind)) for p in recipe.phases),
            ),
            4,
        )[2]
        for kind in ("ddp", "fsdp")
    )
    assert ddp.micro_batch == fsdp.micro_batch == 1
    assert ddp.communication == 2 * 3 / 4 * ddp.gradients
    assert fsdp.communication == 3 * 3 / 4 * ddp.gradients
    assert fsdp.optimizer == ddp.optimizer / 4
    assert fsdp.flops == pytest.approx(ddp.flops)


def test_times_are_said_to_be_predictions(tmp_path: Path) -> None:
    plans = plan(micro_recipe(tmp_path), 2)
    text = table(plans)
    assert "predictions, not measured" in text
    assert all(name in text for name in CHIPS)
    one, chip = plans[2], CHIPS["H100"]
    expected = one.flops / 2 / (chip.flops * OF_FLOPS)
    expected += 3 * (one.optimizer + one.gradients) / (chip.memory * OF_MEMORY)
    expected += one.communication / (chip.link * OF_LINK)
    assert one.seconds(chip) == pytest.approx(expected)


def test_a_batch_that_cannot_be_shared_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gpus: expected at least 1, found 0"):
        plan(micro_recipe(tmp_path), 0)
    with pytest.raises(ValueError, match="batch: expected a multiple of the 3 processes, found 4"):
        plan(micro_recipe(tmp_path), 3)


_MEASURE = """
import torch
from benchmarks._machine import peak_extra_bytes
from hitsr_fast.models import PRESETS, HitVar
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.task import Batch
from hitsr_fast.train.tasks import TASKS
from tests.train.test_plan import hit_tiny

torch.set_num_threads(1)
recipe = hit_tiny(8)
(phase,) = recipe.phases
task = TASKS["next_scale"](HitVar(PRESETS["hit-tiny"]), phase, recipe.data, "cpu")

def step(samples):
    images = torch.randint(0, 256, (samples, 3, 128, 128), dtype=torch.uint8)
    batch = Batch(images, torch.arange(samples))
    task(batch, Draw(0, "plan", batch.index, "cpu")).total.backward()

step(1)
one, many = (peak_extra_bytes(lambda: step(samples), torch.device("cpu")) for samples in (1, 8))
print(many - one)
"""


def hit_tiny(batch: int):  # type: ignore[no-untyped-def]
    """Its transformer phase alone, of a batch that fits anywhere."""
    recipe = load_recipe("hit-tiny")
    (phase,) = (p for p in recipe.phases if p.name == "next_scale")
    task = replace(phase.task, mistakes=0.0, scale_balance=0.0)  # type: ignore[type-var]
    precision = replace(phase.precision, dtype="float32")
    return replace(
        recipe, phases=(replace(phase, task=task, batch=batch, precision=precision, init_from=()),)
    )


def test_memory_is_what_a_process_takes() -> None:
    """Within 15 %: what eight samples take more than one, by resident memory of a fresh process."""
    assert "hit-tiny" in PRESETS
    many, one = (plan(hit_tiny(batch), 1)[0] for batch in (8, 1))
    expected = many.activations - one.activations
    measured = int(
        subprocess.check_output(
            [sys.executable, "-c", _MEASURE],
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        )
    )
    assert measured == pytest.approx(expected, rel=0.15)


@pytest.fixture
def one_of_24() -> Iterator[Parallel]:
    """A process of PyTorch's stand-in for 24, which sends nothing."""
    dist.init_process_group("fake", rank=0, world_size=24, store=FakeStore())
    parallel = Parallel("cpu", 0, 24)
    assert parallel.mesh.size() == 24  # made here, for it reads values
    yield parallel
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["tokenize", "next_scale"])
def test_24_gpus_take_the_papers_recipe(one_of_24: Parallel, name: str) -> None:
    """Each phase of hit-d16, sharded over 24: forward and backward pass of a micro-batch, all gradients."""
    recipe = load_recipe("hit-d16")
    (phase,) = (p for p in recipe.phases if p.name == name)
    phase = replace(phase, parallel=replace(phase.parallel, strategy="fsdp", micro_batch=4))
    micro_batches = IndexSampler(phase.batch, phase.parallel.micro_batch, 0, 24).micro_batches(0)
    assert [len(part) for part in micro_batches] == [4] * 4
    with shapes_only(recipe, phase) as task:
        whole = {name: p.shape for name, p in task.named_parameters() if p.requires_grad}
        called = one_of_24.prepare(task, phase)
        forward_backward(called, 4, side_of(recipe))
        trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
        assert trained.keys() == whole.keys()
        for own, parameter in trained.items():
            assert parameter.grad is not None and parameter.grad.shape == whole[own], own
            assert local(parameter).shape[0] == -(-whole[own][0] // 24), own
