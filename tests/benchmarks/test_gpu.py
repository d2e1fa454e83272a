"""The command for whoever has a GPU: its plan, and that its steps go on, on a machine without one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.__main__ import OPS
from benchmarks.gpu import Arguments, Step, main
from tests.ops import small_calls

ROOT = Path(__file__).resolve().parents[2]


def test_the_plan_runs_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--plan", "--report", str(tmp_path / "report.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in ("HITSR_FAST_CUDA=1", "pytest -m gpu", "benchmarks run residual_quantize --device cuda"):
        assert part in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_steps_are_of_this_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files that are named exist, and so do ops; compute-sanitizer is looked for where toolkits have it."""
    assert set(gpu.BENCHMARKS) <= set(OPS)
    assert (ROOT / "setup.py").is_file()
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (step, _) = (step for step in gpu.steps(tmp_path) if step.name.startswith("compute-sanitizer"))
    assert step.command[0] == str(tool)
    tool.unlink()
    monkeypatch.setattr(gpu, "sanitizer", lambda: None)
    (step, _) = (step for step in gpu.steps(tmp_path) if step.name.startswith("compute-sanitizer"))
    assert not step.command and "compute-sanitizer is neither on the PATH" in str(step)


def test_each_step_goes_on_after_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def found(results: Path) -> Iterator[Step]:
        python = sys.executable
        (results / "numbers.csv").write_text("median_ms\n1.5\n")
        yield Step("good", [python, "-c", "print('it works')"], 60)
        yield Step("bad", [python, "-c", "import sys; print('oh'); sys.exit(3)"], 60)
        yield Step("slow", [python, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 2)
        yield Step("absent", [str(tmp_path / "nowhere")], 60)
        yield Step("impossible", [], 60, reason="there is no such tool")
        yield Step("named", [python, "-c", "import os; print(os.environ['NAME'])"], 60, {"NAME": "a value"})

    report = tmp_path / "out" / "report.md"
    assert main(Arguments(report=report), found) == 1
    text = report.read_text()
    for line in (
        "| good | ok |",
        "| bad | failed with code 3 |",
        "| slow | ended after 2 s |",
        "| absent | not run: ",
        "| impossible | not run: there is no such tool |",
        "| named | ok |",
        *("it works", "oh", "begun", "a value", "median_ms\n1.5"),
    ):
        assert line in text
    assert "report: " in capsys.readouterr().out
    assert main(Arguments(report=report, seconds=0), found) == 1
    assert "| good | not run: the time is up |" in report.read_text()


def test_the_first_steps_run_anywhere(tmp_path: Path) -> None:
    (packages,) = (step for step in gpu.steps(tmp_path) if step.name == "packages")
    outcome = gpu.run(packages, 60)
    assert outcome.result == "ok" and "torch" in outcome.output, outcome.output


def test_all_in_all_good(tmp_path: Path) -> None:
    def found(results: Path) -> Iterator[Step]:
        yield Step("good", [sys.executable, "-c", ""], 60)

    assert main(Arguments(report=tmp_path / "report.md"), found) == 0


def test_small_calls_reach_every_op() -> None:
    """By the definition, here; a GPU has other backends."""
    assert small_calls.run("cpu", ("reference",)) >= len(small_calls.EXAMPLES)
