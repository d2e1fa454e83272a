"""`pytest benchmarks` on tiny cases: every op is verified and timed, and what is wrong is not timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import test_ops
from benchmarks.__main__ import OPS, load
from benchmarks._harness import Trial
from tests.benchmarks.test_harness import CPU, Doubling, provider

ROOT = Path(__file__).resolve().parents[2]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    # A worker's child would take itself for a worker, which times nothing.
    ours = ("OMP_NUM_THREADS", "PYTEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-rs", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """What is printed and saved for everything but what is compiled first, or is a whole model."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    done = run(
        *("--quick", "--threads", "1", "--device", "cpu", "--benchmark-json", str(path)),
        *("--benchmark-max-time", "0.01", "--benchmark-min-rounds", "1"),
        *("-k", "not compile and not flex-attention and not pykeops and not generate and not systems"),
    )
    assert done.returncode == 0, done.stdout
    return done.stdout, json.loads(path.read_text())["benchmarks"]


def test_every_case_is_a_group_with_its_providers(report: tuple[str, list[dict[str, Any]]]) -> None:
    _, rows = report
    found = {(row["group"], row["extra_info"]["provider"]) for row in rows}
    cases = [(op, case) for op in OPS if op not in ("generate", "systems") for case in load(op).quick]
    assert {group for group, _ in found} == {f"{op} {case}" for op, case in cases}
    assert len(found) == len(rows) > 2 * len(cases)
    assert all(row["stats"]["median"] > 0 and row["extra_info"]["version"] for row in rows)


def test_providers_that_cannot_run_are_skipped_with_their_reason(
    report: tuple[str, list[dict[str, Any]]],
) -> None:
    printed, rows = report
    assert "Triton's interpreter is not worth timing" in printed
    assert not any("-triton" in row["name"] for row in rows)


def test_providers_can_be_chosen() -> None:
    done = run("--quick", "--collect-only", "-k", "residual_quantize and steps and reference")
    assert "residual_quantize-steps-B2-K130-C8-toy-reference" in done.stdout
    assert done.stdout.count("test_op[") == 1


def test_threads_are_checked() -> None:
    done = run("--collect-only", "--threads", "0")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--threads: expected at least 1, found 0" in done.stderr


@pytest.mark.parametrize("ours", [True, False])
def test_what_is_wrong_and_ours_is_not_timed(ours: bool) -> None:
    class Fixture:
        def __init__(self) -> None:
            self.extra_info: dict[str, Any] = {}
            self.timed = False

        def __call__(self, call: object) -> None:
            self.timed = True

    fixture: Any = Fixture()
    wrong = provider("wrong", lambda x: 2 * x + (x > 5), ours=ours)
    with pytest.raises(AssertionError) if ours else nullcontext():
        test_ops.test_op(fixture, "", Trial.of(Doubling(8), CPU), wrong, torch.get_num_threads())
    assert fixture.timed != ours
    assert ours or fixture.extra_info["wrong_rows"] == 2
