"""What processes share: checkpoints of any number of them, whole weights, and what they tell each other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hitsr_fast.train.checkpoint import TrainState
from hitsr_fast.train.optim import Muon
from hitsr_fast.train.parallel import Parallel, local
from tests.tolerances import TOLERANCES
from tests.train.jobs import Run, run, run_all
from tests.train.ranks import on_ranks
from tests.train.toy import CODES, WIDTH, Toy, toy_phase

CLOSE = TOLERANCES["float32_training"]._asdict()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A checkpoint of two processes after three of seven steps, and the undisturbed run."""
    folder, phase = tmp_path_factory.mktemp("pair"), toy_phase(7, strategy="fsdp")
    jobs = (
        (folder / "part", phase, {"stop": 3, "ranks": (1,)}),
        (folder / "whole", phase, {}),
    )
    (part, whole), _ = on_ranks(2, run_all, *jobs)
    assert part.code == 75
    return folder / "part", whole


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_a_checkpoint_of_two_processes_is_of_any_number(
    world: int, strategy: str, saved: tuple[Path, Run], tmp_path: Path, four: dict[str, Run]
) -> None:
    """Rows are shared unevenly, by two and by four; with Muon, AdamW and averages."""
    folder, whole = saved
    if world == 1:
        shutil.copytree(folder, tmp_path / "alone")
        found = run(tmp_path / "alone", toy_phase(7, strategy=strategy))
    else:
        found = four[strategy]
    assert {"kind": "resumed", "step": 3} in found.lines
    assert [step for step, _ in found.steps] == [4, 5, 6, 7]
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(whole.losses[3:]), **CLOSE)
    for name, value in whole.weights.items():
        torch.testing.assert_close(found.weights[name], value, **CLOSE)


@pytest.fixture(scope="module")
def four(saved: tuple[Path, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    jobs = []
    for strategy in ("fsdp", "ddp"):
        folder = tmp_path_factory.mktemp("four") / strategy
        shutil.copytree(saved[0], folder)
        jobs.append((folder, toy_phase(7, strategy=strategy), {}))
    return dict(zip(("fsdp", "ddp"), on_ranks(4, run_all, *jobs)[0], strict=True))


# --- inside of two processes


def look_inside() -> dict[str, Any]:
    """What a process has and is told."""
    phase = toy_phase(strategy="fsdp")
    parallel, task = Parallel.start("cpu"), Toy(phase)
    plain = {name: p.detach().clone() for name, p in task.named_parameters()}
    with torch.no_grad():
        task.enter.weight += parallel.rank
        task.shift += parallel.rank
    parallel.share(task)
    shared = torch.equal(task.enter.weight, plain["enter.weight"]) and task.shift.eq(0).all().item()
    parallel.prepare(task, phase)
    state = TrainState(task, phase, parallel)
    (muon,) = [optimizer for optimizer in state.optimizers if isinstance(optimizer, Muon)]
    found: dict[str, Any] = {
        "rank": parallel.rank,
        "shared": shared,
        "sharded": {name for name, p in task.named_parameters() if isinstance(p, DTensor)},
        "rows": [len(local(task.embedding.weight)), len(local(task.blocks[0].down.weight))],
        "ema": state.ema.tensors()["embedding.weight"].shape,
        "own": len(state.ema._values["embedding.weight"]),
        "muon": [len(muon.state[p]["momentum_buffer"]) for p in muon.param_groups[0]["params"]],
        "mean": parallel.mean({"a": torch.tensor(float(parallel.rank)), "b": torch.ones(2)}),
        "total": parallel.total({"n": torch.tensor([2**40 + parallel.rank])}),
        "agreed": parallel.agreed(parallel.rank == 1, False),
    }
    with parallel.whole(task):
        task.blocks[0](torch.zeros(1, WIDTH))  # alone
        found["whole"] = {name: p.detach().clone() for name, p in task.named_parameters()}
    found["again"] = len(local(task.embedding.weight))
    parallel.release(task)
    found["released"] = {name: p.detach().clone() for name, p in task.named_parameters()}
    found["plain"] = plain
    return found


def test_what_processes_have_and_tell_each_other() -> None:
    found = on_ranks(2, look_inside)
    for one in found:
        assert one["shared"]
        trained = {name for name, p in Toy(toy_phase()).named_parameters() if p.requires_grad}
        assert one["sharded"] == trained and "still.weight" not in trained
        assert one["ema"] == (CODES, WIDTH)
        assert one["own"] == one["rows"][0] == one["again"]
        assert float(one["mean"]["a"]) == 0.5 and one["mean"]["b"].tolist() == [1.0, 1.0]
        assert one["total"]["n"].tolist() == [2**41 + 1]
        assert one["agreed"] == [True, False]
        for whole in ("whole", "released"):
            assert all(torch.equal(_plain(one[whole][name]), value) for name, value in one["plain"].items())
    assert [one["rows"] for one in found] == [[3, 4], [2, 3]]
    assert [sum(column) for column in zip(*(one["muon"] for one in found), strict=True)] == [3, 7, 3, 7]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_one_process_needs_no_others() -> None:
    alone = Parallel.start("cpu")
    assert (alone.rank, alone.world, alone.is_main) == (0, 1, True)
    assert alone.agreed(True, False) == [True, False]
    assert alone.mean({}) == {} and float(alone.mean({"a": torch.tensor(3)})["a"]) == 3.0
