"""The log: what a line holds, what a kill and a resume leave, and what is shown."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from hitsr_fast.train import log as module
from hitsr_fast.train.config import LogConfig
from hitsr_fast.train.log import Log, SilentLog, append_line, image_grid, measured_peak, perplexity
from tests.tolerances import TOLERANCES

EXACT = TOLERANCES["few_float32_roundings"]


def make(folder: Path, phase: str = "first", steps: int = 10, **config: Any) -> Log:
    speed = {"tokens_per_step": 100.0, "flops_per_step": 2e6, "peak_flops": 1e9}
    return Log(folder, LogConfig(**{"every": 2, **config}), phase=phase, steps=steps, **speed)


def lines(folder: Path, kind: str | None = "step") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in found if kind in (None, line["kind"])]


def take(log: Log, *steps: int, loss: float | None = None, codes: torch.Tensor | None = None) -> None:
    counts = {} if codes is None else {"codes": codes}
    for step in steps:
        means = {"loss": torch.tensor(float(step) if loss is None else loss)}
        log.step(step, means, counts, lr=0.1, waited=0.0)


def test_a_line_has_the_means_of_its_steps(tmp_path: Path) -> None:
    log = make(tmp_path)
    for step in (1, 2):
        means = {"loss": torch.tensor(float(step)), "accuracy": torch.tensor([0.5, step / 4]), "given": 3.0}
        log.step(step, means, {}, lr=0.25, waited=1e-4)
    (line,) = lines(tmp_path)
    assert (line["phase"], line["step"], line["loss"], line["lr"]) == ("first", 2, 1.5, 0.25)
    assert line["accuracy"] == [0.5, 0.375] and line["given"] == 3.0
    pace = line["seconds_per_step"]
    assert math.isclose(line["tokens_per_s"], 100 / pace) and math.isclose(line["mfu"], 2e6 / pace / 1e9)
    assert math.isclose(line["data_wait"], min(1.0, 1e-4 / pace), rel_tol=1e-6)
    assert math.isclose(line["eta_s"], 8 * pace) and line["memory_gib"] > 0.01
    assert lines(tmp_path, "start")[0]["peak_flops"] == 1e9


def test_the_last_step_has_a_line(tmp_path: Path) -> None:
    take(make(tmp_path, steps=3), 1, 2, 3)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 1.5), (3, 3.0)]


def test_values_are_read_where_a_line_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    monkeypatch.setattr(module, "_copied", lambda rows, own=module._copied: copies.append(1) or own(rows))
    log = make(tmp_path, every=5)
    nothing = torch.empty((), device="meta")  # whose value cannot be read
    for step in range(1, 5):
        log.step(step, {"loss": nothing}, {"codes": nothing.expand(1, 4)}, lr=0.1, waited=0.0)
    with pytest.raises(NotImplementedError):
        log.step(5, {"loss": nothing}, {}, lr=0.1, waited=0.0)
    copies.clear()
    log = make(tmp_path, every=5)
    take(log, *range(1, 5))
    assert not copies
    take(log, 5)
    assert copies == [1]


def test_usage_and_perplexity_are_of_each_scale(tmp_path: Path) -> None:
    log = make(tmp_path)
    take(log, 1, codes=torch.tensor([[2, 0, 0, 0], [1, 1, 0, 0]]))
    take(log, 2, codes=torch.tensor([[2, 0, 0, 0], [0, 0, 1, 1]]))
    (line,) = lines(tmp_path)
    assert line["usage"] == [0.25, 1.0]
    np.testing.assert_allclose(line["perplexity"], [1.0, 4.0], rtol=1e-5)


def test_perplexity_is_its_formula() -> None:
    counts = torch.randint(0, 9, (3, 7))
    share = counts.double() / counts.sum(1, keepdim=True)
    expected = torch.stack([torch.exp(-sum(p * p.log() for p in row if p > 0)) for row in share])
    torch.testing.assert_close(perplexity(counts).double(), expected, **EXACT._asdict())
    assert perplexity(torch.zeros(1, 4, dtype=torch.int64)).tolist() == [1.0]


def test_collapse_is_said_once_until_it_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = make(tmp_path, every=1, min_usage=0.5)
    one, all_four = torch.tensor([[9, 0, 0, 0]]), torch.tensor([[3, 2, 2, 2]])
    for step, codes in enumerate((all_four, one, one, all_four, one), start=1):
        take(log, step, codes=codes)
    assert [line["step"] for line in lines(tmp_path, "warning")] == [2, 5]
    assert "only 25.0% of the codes are in use" in capsys.readouterr().out


def test_few_tokens_are_no_collapse(tmp_path: Path) -> None:
    """Two tokens cannot use more than two of a thousand codes."""
    codes = torch.zeros(1, 1000, dtype=torch.int64)
    codes[0, :2] = 1
    take(make(tmp_path, every=1, min_usage=0.9), 1, codes=codes)
    assert not lines(tmp_path, "warning")


def test_what_is_not_finite_is_counted_and_left_out(tmp_path: Path) -> None:
    log = make(tmp_path, every=3)
    for step, loss in enumerate((1.0, math.nan, 3.0, math.inf, math.inf, math.inf), start=1):
        take(log, step, loss=loss)
    first, second = lines(tmp_path)
    assert (first["loss"], first["not_finite"]) == (2.0, 1)
    assert (second["loss"], second["not_finite"]) == (None, 3)


@pytest.mark.parametrize("cut", [1, 20])
def test_a_resume_mends_a_broken_line(tmp_path: Path, cut: int) -> None:
    take(make(tmp_path), 1, 2, 3, 4)
    path = tmp_path / "log.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    take(make(tmp_path), 3, 4)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]
    assert len(lines(tmp_path, "start")) == 2


def test_a_resume_drops_its_own_lines_beyond(tmp_path: Path) -> None:
    other = make(tmp_path, "other")
    take(other, *range(1, 9))
    log = make(tmp_path)
    take(log, *range(1, 7))
    log.line("held_out", psnr=20.0)
    again = make(tmp_path)
    again.line("resumed", step=4)
    take(again, 5, 6, loss=0.5)
    steps = [(line["phase"], line["step"], line["loss"]) for line in lines(tmp_path)]
    assert steps == [
        *(("other", step, step - 0.5) for step in (2, 4, 6, 8)),
        *(("first", 2, 1.5), ("first", 4, 3.5), ("first", 6, 0.5)),
    ]
    assert not lines(tmp_path, "held_out") and [x["step"] for x in lines(tmp_path, "resumed")] == [4]
    assert not list(tmp_path.glob("*.part"))


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    append_line(path, {"a": 1})

    class Full:
        def __init__(self, file: Any) -> None:
            self._file, self._left = file, 5

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, data: bytes) -> int:
            if self._left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written, self._left = self._file.write(data[: self._left]), 0
            return int(written)

    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Full(real(self, *a, **k)))
    with pytest.raises(OSError, match=r"No space left on device: '.*log\.jsonl'"):
        append_line(path, {"b": 2})
    monkeypatch.undo()
    assert path.read_text() == '{"a": 1}\n'


def test_lines_are_plain_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = make(tmp_path)
    take(log, 1, 2)
    log.line("held_out", psnr=24.56789, lpips=0.25)
    log.close()
    start, step, held_out = capsys.readouterr().out.splitlines()
    assert start.startswith("phase=first step=0 kind=start steps=10")
    assert step.startswith("first 2/10 loss 1.5 lr 0.1 ")
    assert all(word in step for word in ("tokens/s", "MFU", "GiB", "wait", "ETA 0:00:"))
    assert held_out == "phase=first step=2 kind=held_out psnr=24.57 lpips=0.25"
    assert "\x1b" not in step


def test_a_terminal_has_one_line_that_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(module, "Console", lambda **o: Console(force_terminal=True, **o))
    log = make(tmp_path)
    take(log, 1, 2, 3, 4)
    log.close()
    said = capsys.readouterr().out
    assert "4/10" in said and "loss 3.5" in said and "\x1b[" in said


def test_a_grid_has_a_column_a_name(tmp_path: Path) -> None:
    log = make(tmp_path)
    hr = torch.full((2, 3, 8, 8), 1.0)
    lr = torch.full((2, 3, 2, 2), -1.0)
    lr[0, 0, 0, 0] = 1.0
    path = log.images(100, {"LR": lr, "HR": hr})
    assert path == tmp_path / "first" / "images" / "step-00000100.png"
    picture = np.asarray(Image.open(path))
    assert picture.shape == (14 + 8 + 2 + 8, 8 + 2 + 8, 3)
    first = picture[14:22, :8]
    assert (first[:4, :4] == (255, 0, 0)).all() and (first[4:] == 0).all() and (first[:, 4:] == 0).all()
    assert (picture[14:22, 10:] == 255).all()
    assert (picture[:14] < 255).any(), "the names stand above"
    with pytest.raises(ValueError, match="columns: expected at least one, found none"):
        image_grid({})


def test_a_silent_log_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = SilentLog()
    take(log, 1, 2)
    log.line("held_out", psnr=1.0)
    log.images(1, {})
    log.restart_clock()
    log.close()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_what_is_done_beside_steps_takes_none_of_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    log = make(tmp_path)
    for step in (1, 2):
        now[0] += 3.0
        take(log, step)
    now[0] += 1000.0
    log.restart_clock()
    for step in (3, 4):
        now[0] += 3.0
        take(log, step)
    assert [line["seconds_per_step"] for line in lines(tmp_path)] == [3.0, 3.0]


def test_the_peak_is_measured_once() -> None:
    measured_peak.cache_clear()
    first = measured_peak(torch.device("cpu"), torch.float32, 64)
    assert first > 1e6 and measured_peak(torch.device("cpu"), torch.float32, 64) == first


def test_tensorboard_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"log\.tensorboard: .*hitsr-fast\[tensorboard\]"):
        make(tmp_path, tensorboard=True)


def test_tensorboard_has_numbers_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = make(tmp_path, tensorboard=True)
    take(log, 1, 2, codes=torch.eye(2, dtype=torch.int64))
    log.images(2, {"HR": torch.zeros(1, 3, 4, 4)})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "first"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 1.5)]
    assert {"usage/scale_0", "usage/scale_1"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["images"]
