"""The training loop on a problem of a few weights: resuming, stopping, logging, scheduling."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.models import HitTransformer
from hitsr_fast.train.config import LoopConfig
from hitsr_fast.train.loop import ResumeError, learning_rate, moving_average, parameter_groups, train
from tests.models.micro import MICRO

CONFIG = LoopConfig(steps=20, checkpoint_minutes=0.0, log_every=5, eval_every=10, ema=0.9)
SAVE_AT_END = replace(CONFIG, checkpoint_minutes=math.inf)


class StoppedError(Exception):
    """Stands for whatever ends a run in the middle."""


class Regression:
    """Fits a linear map with dropout, by both kinds of optimiser; `at` may interfere with a step's loss."""

    name = "regression"

    def __init__(self, at: Callable[[int], float] = lambda step: 1.0) -> None:
        torch.manual_seed(1)
        self.model: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.at = at
        self.evaluated: list[bool] = []

    def optimizers(self) -> list[torch.optim.Optimizer]:
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        return [torch.optim.AdamW(vectors, 0.05), torch.optim.Muon(matrices, 0.02)]

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        torch.manual_seed(step)
        x = torch.randn(8, 4)
        loss = F.mse_loss(self.model(x), x.sum(1, keepdim=True)) * self.at(step)
        return loss, {"step_number": float(step)}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        self.evaluated.append(model.training or torch.is_grad_enabled())
        return {"held_out": 1.0}


def stop_at(stop: int) -> Callable[[int], float]:
    def at(step: int) -> float:
        if step == stop:
            raise StoppedError
        return 1.0

    return at


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("stops", [[1], [7], [3, 3, 12]])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(stops: list[int], tmp_path: Path) -> None:
    unbroken = Regression()
    expected = train(unbroken, CONFIG, tmp_path / "unbroken")
    for stop in stops:
        with pytest.raises(StoppedError):
            train(Regression(stop_at(stop)), CONFIG, tmp_path / "broken")
    broken = Regression()
    found = train(broken, CONFIG, tmp_path / "broken")
    assert same(expected, found)
    assert same(unbroken.model, broken.model)
    assert not same(found, Regression().model)


def test_the_average_is_what_a_stage_yields(tmp_path: Path) -> None:
    stage = Regression()
    assert not same(train(stage, CONFIG, tmp_path), stage.model)


def test_a_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    first = train(Regression(), CONFIG, tmp_path)
    before = log(tmp_path)
    again = train(Regression(stop_at(0)), replace(CONFIG, steps=20), tmp_path)
    assert same(first, again)
    assert log(tmp_path) == before


def test_more_steps_go_on_from_there(tmp_path: Path) -> None:
    train(Regression(), CONFIG, tmp_path)
    train(Regression(stop_at(19)), replace(CONFIG, steps=25), tmp_path)
    assert log(tmp_path)[-1]["step"] == 25


def test_no_steps_leave_the_model_as_it_is(tmp_path: Path) -> None:
    assert same(train(Regression(stop_at(0)), replace(CONFIG, steps=0), tmp_path), Regression().model)
    assert list(tmp_path.iterdir()) == []


def test_time_ends_a_run_too(tmp_path: Path) -> None:
    train(Regression(), replace(CONFIG, steps=10**9, minutes=0.05 / 60), tmp_path)
    last = log(tmp_path)[-1]
    assert last["done"] == 1.0 and 0 < last["step"] < 10**9
    train(Regression(stop_at(int(last["step"]))), replace(CONFIG, steps=10**9, minutes=0.05 / 60), tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(bad: float, tmp_path: Path) -> None:
    stage = Regression(lambda step: bad if step == 6 else 1.0)
    with pytest.raises(FloatingPointError, match=rf"regression: the loss is {bad} at step 6; .*step_number"):
        train(stage, CONFIG, tmp_path)
    assert all(parameter.isfinite().all() for parameter in stage.model.parameters())
    assert torch.load(tmp_path / "regression.pt", weights_only=True)["step"] == 6
    train(Regression(stop_at(0)), replace(CONFIG, steps=6), tmp_path)


def test_a_checkpoint_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoppedError):
        train(Regression(stop_at(4)), CONFIG, tmp_path)
    before = (tmp_path / "regression.pt").read_bytes()

    def full_disk(state: object, path: Path) -> None:
        path.write_bytes(before[:100])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space left"):
            train(Regression(), CONFIG, tmp_path)
    assert (tmp_path / "regression.pt").read_bytes() == before
    assert same(train(Regression(), CONFIG, tmp_path), train(Regression(), CONFIG, tmp_path / "unbroken"))


def test_log(tmp_path: Path) -> None:
    stage = Regression()
    train(stage, SAVE_AT_END, tmp_path)
    entries = log(tmp_path)
    assert [(e["step"], "loss" in e, "held_out" in e, "done" in e) for e in entries] == [
        (5, True, False, False),
        (10, True, False, False),
        (10, False, True, False),
        (15, True, False, False),
        (20, True, False, False),
        (20, False, True, False),
        (20, False, True, True),
    ]
    assert set(entries[0]) == {"stage", "step", "minutes", "loss", "step_number", "grad_norm"}
    assert [e["step_number"] for e in entries if "loss" in e] == [2, 7, 12, 17], "means since the last line"
    assert stage.evaluated == [False] * 3, "in evaluation mode and without gradients"
    assert stage.model.training


def test_log_means_after_a_resume(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        train(Regression(stop_at(8)), CONFIG, tmp_path)
    train(Regression(), CONFIG, tmp_path)
    numbers = {e["step"]: e["step_number"] for e in log(tmp_path) if "loss" in e}
    assert numbers == {5: 2, 10: 8.5, 15: 12, 20: 17}, "the line at step 10 knows of steps 8 and 9 only"


def test_learning_rate() -> None:
    config = LoopConfig(warmup=0.1, final_lr=0.05)
    rates = [learning_rate(i / 1000, config) for i in range(1001)]
    assert 0 < rates[0] < 0.01
    assert rates[100] == pytest.approx(1.0)
    assert rates[50] == pytest.approx(0.5, rel=1e-3)
    assert rates[325] == pytest.approx(0.05 + 0.95 * (1 + math.sqrt(0.5)) / 2)
    assert rates[550] == pytest.approx((1 + 0.05) / 2)
    assert rates[1000] == pytest.approx(0.05)
    assert all(a < b for a, b in pairwise(rates[:101]))
    assert all(a > b for a, b in pairwise(rates[100:]))
    assert learning_rate(1.2, config) == pytest.approx(0.05)
    assert learning_rate(0.0, LoopConfig(warmup=0.0)) == 1.0


def test_the_loop_sets_the_learning_rate(tmp_path: Path) -> None:
    config = replace(SAVE_AT_END, warmup=0.0, final_lr=0.5)
    optimizers: list[torch.optim.Optimizer] = []
    stage = Regression()
    real = stage.optimizers
    stage.optimizers = lambda: optimizers or optimizers.extend(real()) or optimizers  # type: ignore[method-assign]
    train(stage, config, tmp_path)
    last = learning_rate(19 / 20, config)
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == pytest.approx(
        [0.05 * last, 0.02 * last]
    )


def test_gradients_are_clipped(tmp_path: Path) -> None:
    """AdamW does not see a scale, plain descent does: no step is longer than the bound times the rate."""
    stage = Regression(lambda step: 1e6)
    stage.optimizers = lambda: [torch.optim.SGD(stage.model.parameters(), 1.0)]  # type: ignore[method-assign]
    before = torch.cat([p.detach().flatten() for p in stage.model.parameters()]).clone()
    train(stage, replace(CONFIG, steps=1, warmup=0.0, clip=0.5), tmp_path)
    after = torch.cat([p.detach().flatten() for p in stage.model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.5, rel=1e-3)


def test_moving_average_soon_forgets_the_first_weights() -> None:
    update = moving_average(0.99)
    average, current = [torch.zeros(3)], [torch.ones(3)]
    update(average, current, torch.tensor(0))
    assert average[0].tolist() == pytest.approx([0.9] * 3)
    update(average, [torch.zeros(3)], torch.tensor(10**6))
    assert average[0].tolist() == pytest.approx([0.9 * 0.99] * 3)


def test_only_matrices_and_kernels_decay() -> None:
    transformer = HitTransformer(MICRO)
    decayed, plain = parameter_groups(transformer.named_parameters(), 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in transformer.named_parameters()}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert {names[p].split(".", 2)[-1] for p in decayed["params"] if names[p].startswith("blocks.")} == {
        "attn.mat_qkv.weight",
        "attn.proj.weight",
        "ffn.fc1.weight",
        "ffn.fc2.weight",
        "ada_lin.1.weight",
    }
    assert {names[p] for p in decayed["params"] if not names[p].startswith("blocks.")} == {
        "head.weight",
        "head_nm.ada_lin.1.weight",
    }


def stop_with(made_with: dict[str, Any] | None, folder: Path) -> None:
    with pytest.raises(StoppedError):
        train(Regression(stop_at(7)), CONFIG, folder, made_with)


def test_a_run_resumes_with_what_it_was_made_with(tmp_path: Path) -> None:
    made_with = {"seed": 3, "holdout": ("a", "b"), "loss": {"weight": 0.1, "end": math.inf}}
    stop_with(made_with, tmp_path / "broken")
    expected = train(Regression(), CONFIG, tmp_path / "unbroken")
    assert same(train(Regression(stop_at(6)), CONFIG, tmp_path / "broken", made_with), expected)


def test_a_run_does_not_resume_with_anything_else(tmp_path: Path) -> None:
    stop_with({"seed": 3, "names": ("a", "b"), "loss": {"weight": 0.1, "kind": "l1"}}, tmp_path)
    before = (tmp_path / "regression.pt").read_bytes()
    other = {"seed": 3, "names": ("a",), "loss": {"weight": 0.2, "kind": "l1"}}
    with pytest.raises(ResumeError) as caught:
        train(Regression(stop_at(0)), CONFIG, tmp_path, other)
    assert str(caught.value) == (
        f"{tmp_path / 'regression.pt'}: was made with names=['a', 'b'], not ['a']; loss.weight=0.1, not 0.2; "
        "resume it with the same values or train in another folder"
    )
    assert (tmp_path / "regression.pt").read_bytes() == before


def test_many_differences_are_counted(tmp_path: Path) -> None:
    stop_with(dict.fromkeys("abcdefg", 1), tmp_path)
    with pytest.raises(
        ResumeError, match=r"a=1, not 2; b=1, not 2; c=1, not 2; d=1, not 2; and 3 more; resume"
    ):
        train(Regression(), CONFIG, tmp_path, dict.fromkeys("abcdefg", 2))


@pytest.mark.parametrize(
    ("then", "now"), [(None, {"seed": 4}), ({"seed": 4, "gone": 1}, {"seed": 4, "new": 2})]
)
def test_what_a_checkpoint_does_not_know_is_not_compared(
    then: dict[str, Any] | None, now: dict[str, Any], tmp_path: Path
) -> None:
    stop_with(then, tmp_path)
    assert ("made_with" in torch.load(tmp_path / "regression.pt", weights_only=True)) == (then is not None)
    train(Regression(stop_at(6)), CONFIG, tmp_path, now)
    with pytest.raises(ResumeError, match="seed=4, not 5"):
        train(Regression(), CONFIG, tmp_path, {"seed": 5})


def test_a_checkpoint_of_another_model_is_one_line(tmp_path: Path) -> None:
    stop_with(None, tmp_path)
    wider = Regression()
    wider.model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 1))
    expected = (
        r"regression\.pt: expected a checkpoint of this model and recipe: .*size mismatch for 0\.weight"
    )
    with pytest.raises(ResumeError, match=expected) as caught:
        train(wider, CONFIG, tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_checkpoint_of_other_optimizers_is_one_line(tmp_path: Path) -> None:
    stop_with(None, tmp_path)
    stage = Regression()
    stage.optimizers = lambda: [torch.optim.SGD(stage.model.parameters(), 1.0)]  # type: ignore[method-assign]
    with pytest.raises(ResumeError, match=r"regression\.pt: expected a checkpoint of this model and recipe"):
        train(stage, CONFIG, tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 nor this", None])
def test_a_broken_checkpoint_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    stop_with(None, tmp_path)
    path = tmp_path / "regression.pt"
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(
        ResumeError, match=r"regression\.pt: expected a checkpoint, found a file that is none"
    ):
        train(Regression(), CONFIG, tmp_path)
