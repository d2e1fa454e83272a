"""Whatever ends a run, a checkpoint can be read, and the run goes on from it as if nothing had been."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load

from hitsr_fast.train import checkpoint
from hitsr_fast.train.checkpoint import CheckpointMismatchError, Checkpoints, SaveError, TrainState
from hitsr_fast.train.config import CheckpointConfig, Phase
from hitsr_fast.train.parallel import Parallel
from tests.train.jobs import run, same
from tests.train.ranks import Ranks, on_ranks
from tests.train.toy import Toy, toy_phase, train_toy, weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # from `steps_in`


def a_state(phase: Phase, fingerprint: str = "f") -> TrainState:
    return TrainState(Toy(phase), phase, Parallel("cpu"), fingerprint)


def checkpoints(folder: Path, **config: Any) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(**config), Parallel("cpu"))


def steps_in(folder: Path) -> list[int]:
    """Those that have a name, each of which must be whole."""
    found = []
    for path in folder.glob("step-*"):
        if re.fullmatch(r"step-\d{8}", path.name):
            facts = json.loads((path / "train.json").read_text())
            load(a_state(toy_phase()).tensors(), checkpoint_id=path, no_dist=True)
            found.append(facts["step"])
            assert path.name == f"step-{found[-1]:08d}"
    latest = folder / "latest"
    assert not latest.exists() or int(latest.read_text()[5:]) in found
    return sorted(found)


def spoil(path: Path) -> None:
    """Cut off what holds the tensors."""
    (file,) = path.glob("*.distcp")
    os.truncate(file, file.stat().st_size // 2)


# --- what is there


def test_n_are_kept_and_the_newest_is_named(tmp_path: Path) -> None:
    run(tmp_path, toy_phase(7), every=2, keep=3)
    assert steps_in(tmp_path) == [4, 6, 7]
    assert (tmp_path / "latest").read_text() == "step-00000007"
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-00000004",
        "step-00000006",
        "step-00000007",
        "latest",
    }


def test_nothing_is_of_a_process(tmp_path: Path) -> None:
    """A checkpoint of two processes has the tensors that one of one has, in their whole shapes."""
    shapes = []
    for world in (1, 2):
        if world == 1:
            run(tmp_path / "1", toy_phase(2))
        else:
            on_ranks(2, run, tmp_path / "2", toy_phase(2, strategy="fsdp"))
        path = tmp_path / str(world) / "step-00000002"
        metadata = checkpoint_metadata(path)
        shapes.append({name: getattr(item, "size", None) for name, item in metadata.items()})
    assert shapes[0] == shapes[1]
    assert shapes[0]["ema/embedding.weight"] == torch.Size([5, 7])
    assert shapes[0]["optimizer/blocks.0.up.weight/momentum_buffer"] == torch.Size([3, 7])
    assert not any("rank" in name or "rng" in name for name in shapes[0])


def checkpoint_metadata(path: Path) -> dict[str, Any]:
    return dict(FileSystemReader(path).read_metadata().state_dict_metadata)


def test_all_of_a_state_comes_back(tmp_path: Path) -> None:
    phase = toy_phase(4, dtype="float16")
    run(tmp_path, phase, bad=(1, 3))
    state = a_state(phase)
    assert checkpoints(tmp_path).load(state) == 4
    assert state.guard.read() == (2, 0) and float(state.guard.scale or 0) == 2.0**14
    fresh = a_state(phase).tensors()
    moved = {name for name, t in state.tensors().items() if not torch.equal(t, fresh[name])}
    assert {name.partition("/")[0] for name in moved} == {"model", "optimizer", "ema", "guard"}
    assert "optimizer/enter.weight/exp_avg_sq" in moved and "model/shift" in moved


def test_another_runs_is_refused(tmp_path: Path) -> None:
    run(tmp_path, toy_phase(2), fingerprint="ours")
    with pytest.raises(
        CheckpointMismatchError, match="expected a checkpoint of 'theirs', found one of 'ours'"
    ):
        run(tmp_path, toy_phase(2), fingerprint="theirs")


def test_time_is_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = checkpoints(tmp_path, minutes=1.0)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 59.0)
    assert not made.due(3)
    monkeypatch.setattr(time, "monotonic", lambda: now + 61.0)
    assert made.due(3)


# --- what cannot be read


def test_an_unreadable_one_is_passed_over_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phase = toy_phase(6)
    whole = run(tmp_path, phase, every=2)
    spoil(tmp_path / "step-00000006")
    state = a_state(phase)
    assert checkpoints(tmp_path).load(state) == 4
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "cannot be read" in line]
    assert str(tmp_path / "step-00000006") in line and line.endswith("falling back to the one before")
    assert (tmp_path / "latest").read_text() == "step-00000004"
    assert (tmp_path / "step-00000006.unreadable").is_dir()
    again = run(tmp_path, phase, every=2)
    assert {"kind": "resumed", "step": 4} in again.lines
    assert again.steps == whole.steps[4:] and same(again.weights, whole.weights)
    assert steps_in(tmp_path) == [4, 6]


@pytest.mark.parametrize("lost", ["train.json", ".metadata", "__0_0.distcp"])
def test_any_file_may_be_lost(lost: str, tmp_path: Path) -> None:
    run(tmp_path, toy_phase(4), every=2)
    (tmp_path / "step-00000004" / lost).unlink()
    assert checkpoints(tmp_path).load(a_state(toy_phase(4))) == 2


@pytest.mark.parametrize("spoiled", ["train.json", ".metadata", "__0_0.distcp"])
def test_any_file_may_be_empty(spoiled: str, tmp_path: Path) -> None:
    run(tmp_path, toy_phase(4), every=2)
    os.truncate(tmp_path / "step-00000004" / spoiled, 0)
    assert checkpoints(tmp_path).load(a_state(toy_phase(4))) == 2


def test_none_that_can_be_read_is_an_error(tmp_path: Path) -> None:
    run(tmp_path, toy_phase(4), every=2)
    for path in tmp_path.glob("step-*"):
        spoil(path)
    with pytest.raises(ValueError, match=r"checkpoints: expected one that can be read.*step-00000002"):
        checkpoints(tmp_path).load(a_state(toy_phase(4)))


# --- what cannot be written


def no_space(*args: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(folder: Path, phase: Phase, rank: int, step: int) -> str:
    """A run on a disk that is full from a step on, for one of the processes; what it says."""
    write = FileSystemWriter.write_data

    def limited(self: FileSystemWriter, *args: Any, **options: Any) -> Any:
        own = int(os.environ.get("RANK", 0)) == rank
        full = own and int(Path(self.path).stem.partition("-")[2]) >= step
        return no_space() if full else write(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", limited)
        try:
            run(folder, phase, every=2)
        except SaveError as error:
            assert error.errno == errno.ENOSPC
            return str(error)
    return ""


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_is_named_and_the_ones_before_stay(world: int, tmp_path: Path) -> None:
    phase = toy_phase(8, strategy="fsdp")
    said = on_ranks(2, full_disk, tmp_path, phase, 1, 6) if world == 2 else [full_disk(tmp_path, phase, 0, 6)]
    for text in said:
        assert text.startswith(f"{tmp_path}: step-00000006 could not be saved (No space left on device)")
    assert steps_in(tmp_path) == [2, 4] and not list(tmp_path.glob("*.part"))
    assert (tmp_path / "latest").read_text() == "step-00000004"


@pytest.mark.parametrize("name", ["_write_synced", "_sync"])
def test_a_disk_may_be_full_at_the_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, toy_phase(2))
    state, made = a_state(toy_phase(2)), checkpoints(tmp_path)
    monkeypatch.setattr(checkpoint, name, no_space)
    made.save(state, 3)
    with pytest.raises(SaveError, match=re.escape(str(tmp_path))):
        made.wait()
    assert steps_in(tmp_path) == [2] and not list(tmp_path.glob("*.part"))


# --- kill -9


class Killed(BaseException):
    """In place of the end of a process."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_end_between_any_two_operations_leaves_what_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all that saving does with files, ended before the first, the second, ... of them."""
    run(tmp_path / "first", toy_phase(4), every=2)
    count, last = 0, 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > last:
                raise Killed
            return function(*args, **options)

        return call

    for name in ("_write_synced", "_sync", "_remove"):
        monkeypatch.setattr(checkpoint, name, counted(getattr(checkpoint, name)))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    seen: list[list[int]] = []
    for operations in range(30):
        folder = tmp_path / str(operations)
        shutil.copytree(tmp_path / "first", folder)
        last = 10**6
        made = checkpoints(folder)
        count, last = 0, operations
        made.save(a_state(toy_phase(4)), 6)
        with contextlib.suppress(SaveError):  # as which PyTorch's part of saving hands on any end
            made.wait()
        ended, last = count > operations, 10**6
        seen.append(steps_in(folder))
        checkpoints(folder)
        assert not list(folder.glob("*.part"))
        assert (folder / "latest").read_text() == f"step-{seen[-1][-1]:08d}"
        if not ended:
            break
    assert len(seen) > 8 and seen[0] == [2, 4] and [2, 4, 6] in seen and seen[-1] == [4, 6]


def trained(*runs: tuple[Path, int], phase: Phase) -> list[dict[str, torch.Tensor]]:
    """Weights of runs, one after the other, which are saved that often."""
    return [weights(train_toy(folder, phase, task=Slow(phase), every=every)[0]) for folder, every in runs]


class Slow(Toy):
    """So that no machine is done before it is killed."""

    def after_step(self, step: int) -> None:
        super().after_step(step)
        time.sleep(0.01)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_lose_nothing(kills: int, world: int, tmp_path: Path) -> None:
    """At random moments, while checkpoints are written without a pause."""
    phase = toy_phase(6 * kills + 6, strategy="fsdp")
    moments = random.Random(world)
    folder, newest = tmp_path / "killed", 0
    for _ in range(kills):
        wanted = f"step-{newest + moments.randint(1, 3):08d}"
        ranks = Ranks(world, functools.partial(trained, phase=phase), (folder, 1))
        until(lambda: any(path.name >= wanted for path in folder.glob("step-????????")), ranks)  # noqa: B023
        time.sleep(moments.uniform(0.0, 0.03))
        first = moments.randrange(world)
        ranks.kill(ranks=slice(first, first + 1))
        time.sleep(moments.uniform(0.0, 0.03))
        ranks.kill()
        assert ranks.wait()[first] == -9
        steps = steps_in(folder)
        assert steps and steps[-1] >= max(newest, 1)
        newest = steps[-1]
    after = Ranks(
        world, functools.partial(trained, phase=phase), (folder, 1), (tmp_path / "undisturbed", 0)
    ).results()
    assert all(same(*pair) for pair in after)
    assert not list(folder.glob("*.unreadable")) and not list(folder.glob("*.part"))


def until(condition: Callable[[], bool], ranks: Ranks, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and all(process.is_alive() for process in ranks.processes)
        time.sleep(0.002)
