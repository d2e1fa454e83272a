"""The loop: exact over interruptions, and the same over processes and micro-batches."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hitsr_fast.train import trainer
from hitsr_fast.train.config import LogConfig, Phase
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.optim import Ema, learning_rate
from tests.tolerances import TOLERANCES
from tests.train.jobs import Run, run, run_all, same
from tests.train.ranks import on_ranks
from tests.train.toy import Lines, Toy, toy_phase, train_toy, weights

CLOSE = TOLERANCES["float32_training"]._asdict()


def assert_close(a: Run, b: Run) -> None:
    """To the order of sums."""
    assert [step for step, _ in a.steps] == [step for step, _ in b.steps]
    for (_, ours), (_, theirs) in zip(a.steps, b.steps, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            values = torch.tensor(ours[name]), torch.tensor(theirs[name])
            torch.testing.assert_close(*values, equal_nan=True, **CLOSE)
    assert a.weights.keys() == b.weights.keys()
    for name, value in a.weights.items():
        torch.testing.assert_close(value, b.weights[name], **CLOSE)


def assert_same(parts: list[Run], whole: Run) -> None:
    """Bit for bit, all that was logged and the weights."""
    assert [step for part in parts for step in part.steps] == whole.steps
    assert same(parts[-1].weights, whole.weights)


# --- interruptions


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_in_two_parts_is_the_whole_run(number: int, tmp_path: Path) -> None:
    phase = toy_phase(8, micro_batch=4)
    whole = run(tmp_path / "whole", phase)
    first = run(tmp_path / "parts", phase, stop=4, number=number)
    assert first.code == 75 and first.lines[-1] == {"kind": "stopped", "step": 4}
    second = run(tmp_path / "parts", phase)
    assert {"kind": "resumed", "step": 4} in second.lines
    assert all(line["kind"] != "prepared" for line in second.lines)
    assert_same([first, second], whole)
    assert len(set(whole.losses)) == 8


def test_a_finished_phase_only_yields(tmp_path: Path) -> None:
    phase = toy_phase(3)
    whole, again = run(tmp_path, phase), run(tmp_path, phase)
    assert again.steps == [] and again.seen == []
    assert same(whole.weights, again.weights)


def test_the_task_is_told_seed_and_steps(tmp_path: Path) -> None:
    done = run(tmp_path, toy_phase(3))
    assert done.lines[0]["kind"] == "prepared" and done.lines[0]["seed"] == 5
    assert done.weights["done"] == 3


# --- processes


@pytest.fixture(scope="module")
def phases() -> dict[str, Phase]:
    return {
        "ddp": toy_phase(6, micro_batch=2),
        "fsdp": toy_phase(6, strategy="fsdp", micro_batch=2),
        "checkpointed": toy_phase(6, strategy="fsdp", activation_checkpointing=True),
        "half": toy_phase(6, strategy="fsdp", dtype="float16"),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process, the whole batch at once."""
    return run(tmp_path_factory.mktemp("alone"), toy_phase(6))


@pytest.fixture(scope="module")
def pair(phases: dict[str, Phase], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Run]]:
    """Two processes: each strategy undisturbed, and in two parts where one of them gets a signal."""
    folder = tmp_path_factory.mktemp("pair")
    jobs: dict[str, tuple[Path, Phase, dict[str, Any]]] = {}
    for name, phase in phases.items():
        jobs[name] = (folder / name, phase, {})
    for name, rank in (("ddp", 0), ("fsdp", 1)):
        number = (signal.SIGTERM, signal.SIGINT)[rank]
        stop = {"stop": 3, "ranks": (rank,), "number": number}
        jobs[f"{name} first"] = (folder / f"{name}-parts", phases[name], stop)
        jobs[f"{name} second"] = (folder / f"{name}-parts", phases[name], {})
    jobs["bad"] = (folder / "bad", phases["fsdp"], {"bad": (2, 4)})
    found = on_ranks(2, run_all, *jobs.values())
    return {name: list(runs) for name, *runs in zip(jobs, *found, strict=True)}


@pytest.mark.parametrize("name", ["ddp", "fsdp", "checkpointed"])
def test_two_processes_are_one(name: str, alone: Run, pair: dict[str, list[Run]]) -> None:
    """To the order of sums, with the same samples in each step, and with the same on all processes."""
    first, second = pair[name]
    assert_close(first, alone)
    assert first.steps == second.steps and same(first.weights, second.weights)
    parts = len(first.seen) // 6
    for step in range(6):
        of_step = slice(step * parts, (step + 1) * parts)
        index = [i for part in first.seen[of_step] + second.seen[of_step] for i in part]
        assert sorted(index) == alone.seen[step] == list(range(step * 8, step * 8 + 8))
    # The first process's log has the counts of all.
    assert first.codes == alone.codes


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_stop_together(name: str, pair: dict[str, list[Run]]) -> None:
    for rank in (0, 1):
        first, second = pair[f"{name} first"][rank], pair[f"{name} second"][rank]
        assert first.code == 75 and first.lines[-1] == {"kind": "stopped", "step": 3}
        assert_same([first, second], pair[name][rank])


def test_micro_batches_are_the_batch(alone: Run, tmp_path: Path) -> None:
    parts = run(tmp_path, toy_phase(6, micro_batch=2))
    assert len(parts.seen) == 24
    assert_close(parts, alone)
    assert parts.codes == alone.codes


def test_recomputed_activations_change_nothing(alone: Run, tmp_path: Path) -> None:
    again = run(tmp_path, toy_phase(6, activation_checkpointing=True))
    assert_same([again], alone)


@pytest.mark.slow  # the compiler takes its time
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_change_nothing_but_roundings(
    checkpointing: bool, alone: Run, tmp_path: Path
) -> None:
    phase = toy_phase(6, compile=True, activation_checkpointing=checkpointing)
    assert_close(run(tmp_path, phase), alone)


# --- losses that are not finite


def test_what_is_not_finite_on_one_process_is_skipped_by_all(
    pair: dict[str, list[Run]], tmp_path: Path
) -> None:
    one = run(tmp_path, toy_phase(6), bad=(2, 4))
    skipped = [line for line in one.lines if line["kind"] == "skipped"]
    assert [(line["step"], line["steps"]) for line in skipped] == [(3, 1), (6, 1)]
    assert [line for line in pair["bad"][0].lines if line["kind"] == "skipped"] == skipped
    assert_close(pair["bad"][0], one)
    assert not all(torch.tensor(one.losses)[2:4].isfinite())
    assert all(torch.isfinite(value).all() for value in one.weights.values())


def test_ten_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    message = r"toy: .*10 steps in a row.*step 12 with the samples 88 to 95 \(all of them: 16 to 95\)"
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, toy_phase(20), bad=(2, 20))
    assert run(tmp_path / "nine", toy_phase(13), bad=(2, 11)).lines[-1]["kind"] == "held_out"


def test_float16_searches_its_scale(pair: dict[str, list[Run]], alone: Run, tmp_path: Path) -> None:
    one = run(tmp_path, toy_phase(6, dtype="float16"))
    assert one.steps[0][1]["loss_scale"] == 2.0**16
    spoiled = run(tmp_path / "spoiled", toy_phase(6, dtype="float16"), bad=(2, 4))
    scales = [values["loss_scale"] for _, values in spoiled.steps]
    assert scales == [2.0**16] * 3 + [2.0**15] + [2.0**14] * 2
    half = TOLERANCES["float16"]._asdict()
    for other in (alone.losses, pair["half"][0].losses):
        torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other), **half)


# --- faults that are planted, each of which a check finds


def average_of(folder: Path, steps: int = 4) -> tuple[list[Tensor], Tensor]:
    """A weight after each step, and what the phase yields of it."""
    seen: list[Tensor] = []

    class Watching(Lines):
        def step(self, *args: Any, **values: Any) -> None:
            seen.append(task.enter.weight.detach().clone())

    phase = toy_phase(steps)
    task = Toy(phase)
    train_toy(folder, phase, task=task, log=Watching())
    return seen, task.enter.weight.detach().clone()


def check_averaged(folder: Path) -> None:
    """The yield is the moving average, whose decay rises from 0.1."""
    seen, yielded = average_of(folder)
    expected = seen[0].double()
    for step, weight in enumerate(seen[1:], 1):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.double()
    torch.testing.assert_close(yielded.double(), expected, **TOLERANCES["float32_reordered"]._asdict())
    assert not torch.equal(yielded, seen[-1])


def check_seeds(folder: Path) -> None:
    """Two seeds have other draws, another seed of the start, and other losses; the same seed the same."""
    codes: list[list[list[int]]] = []
    for number, seed in enumerate((5, 6, 5)):
        log = Lines()
        train_toy(folder / str(number), toy_phase(3), log=log, seed=seed, same_images=True)
        assert log.lines[0]["seed"] == seed
        codes.append(log.codes)
    assert codes[0] != codes[1] and codes[0] == codes[2]


def without_average(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ema, "take", lambda self: None)


def without_seed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer, "Draw", lambda seed, *rest: Draw(0, *rest))


FAULTS = {"average": (check_averaged, without_average), "seed": (check_seeds, without_seed)}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check, plant = FAULTS[name]
    check(tmp_path / "sound")
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(tmp_path / "faulty")


def test_evaluations_and_pictures_come_when_they_are_due(tmp_path: Path) -> None:
    log = Lines(LogConfig(every=2, eval_every=2, images_every=3))
    _, log = train_toy(tmp_path, toy_phase(5), log=log)
    assert [line["step"] for line in log.lines if line["kind"] == "held_out"] == [2, 4, 5]
    assert log.pictures == [3, 5]
    assert [values["lr"] for _, values in log.steps] == [
        1e-2 * learning_rate(step, toy_phase(5).schedule) for step in range(5)
    ]


def test_evaluations_change_nothing(tmp_path: Path) -> None:
    quiet = run(tmp_path / "quiet", toy_phase(5))
    often = Lines(LogConfig(every=2, eval_every=1, images_every=1))
    task, _ = train_toy(tmp_path / "often", toy_phase(5), log=often)
    assert often.losses == quiet.losses and same(weights(task), quiet.weights)
