"""First contact with a GPU in one command: `python -m benchmarks.gpu`, or `make gpu`.

Builds the extensions, runs the tests that need a GPU, compute-sanitizer on small calls, and the benchmarks;
then writes one report, to be attached to an issue. Each step goes on where another failed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TextIO

import tyro

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
LIMIT = 600.0  # seconds, for all steps together
BENCHMARKS = (
    *("residual_quantize", "nearest_code", "scale_block_attention", "sample_codes", "modulated_layer_norm"),
    *("attention_prologue", "dispatch"),
)
_TAIL = 120  # lines of a step's output that the report keeps
_NOT_RUN = "not run"


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        name: its heading in the report.
        command: program and arguments. An empty one cannot run, for `reason`.
        limit: seconds after which it is ended.
        variables: of the environment, beside those that are there.
    """

    name: str
    command: Sequence[str]
    limit: float
    variables: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    def __str__(self) -> str:
        variables = "".join(f"{name}={value} " for name, value in self.variables.items())
        return variables + " ".join(self.command) if self.command else f"{_NOT_RUN}: {self.reason}"


@dataclass(frozen=True)
class Outcome:
    """What came of a step: "ok", or why not."""

    step: Step
    result: str
    seconds: float
    output: str


def sanitizer() -> str | None:
    """The path of compute-sanitizer: that of the PATH, or that of a toolkit."""
    named = (os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH"))
    folders = [f"{folder}/bin" for folder in (*filter(None, named), "/usr/local/cuda")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders)
    )


def steps(results: Path) -> Iterator[Step]:
    """All steps in order; the tables of the benchmarks go to a folder."""
    yield Step("machine", ["nvidia-smi"], 20)
    yield Step("packages", [PYTHON, "-c", "from hitsr_fast.cli import main; main()", "info"], 60)
    build = [PYTHON, "setup.py", "build_ext", "--inplace"]
    yield Step("build", build, 180, {"HITSR_FAST_CUDA": "1"})
    tests = [PYTHON, "-m", "pytest", "-m", "gpu", "-q", "-ra", "--durations=15", "-p", "no:cacheprovider"]
    yield Step("tests", tests, 240)
    tool = sanitizer()
    for check in ("memcheck", "racecheck"):
        # Each tensor an allocation of its own, or writes beyond one go unseen.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        options = ["--tool", check, "--error-exitcode", "9", "--print-limit", "20"]
        calls = [PYTHON, "-m", "tests.ops.small_calls"]
        command = [tool, *options, *calls] if tool else []
        missing = "compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin; the CUDA toolkit has it"
        yield Step(f"compute-sanitizer {check}", command, 75, alone, "" if tool else missing)
    for op in BENCHMARKS:
        run = [PYTHON, "-m", "benchmarks", "run", op, "--device", "cuda", "--repeats", "9"]
        yield Step(f"benchmark {op}", [*run, "--results", str(results / f"{op}.csv")], 60)


def run(step: Step, seconds: float) -> Outcome:
    """Runs a step in at most so many seconds."""
    if not step.command:
        return Outcome(step, str(step), 0.0, "")
    started, limit = time.monotonic(), min(step.limit, seconds)
    if limit <= 1:
        return Outcome(step, f"{_NOT_RUN}: the time is up", 0.0, "")
    try:
        done = subprocess.run(
            step.command,
            cwd=ROOT,
            env=os.environ | step.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
        )
        output, result = done.stdout, "ok" if done.returncode == 0 else f"failed with code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, result = error.stdout or b"", f"ended after {limit:.0f} s"
    except OSError as error:
        output, result = b"", f"{_NOT_RUN}: {error}"
    return Outcome(step, result, time.monotonic() - started, output.decode(errors="replace"))


def write(outcomes: Sequence[Outcome], results: Path, file: TextIO) -> None:
    """The report, in Markdown: a table of the steps, the end of what each printed, the measurements."""
    file.write(f"# First contact with a GPU, {datetime.now():%Y-%m-%d %H:%M}\n\n")
    file.write("| step | result | seconds |\n| --- | --- | --- |\n")
    for outcome in outcomes:
        file.write(f"| {outcome.step.name} | {outcome.result} | {outcome.seconds:.0f} |\n")
    for outcome in outcomes:
        lines = outcome.output.splitlines()
        cut = [f"... {len(lines) - _TAIL} lines before"] if len(lines) > _TAIL else []
        text = "\n".join([*cut, *lines[-_TAIL:]])
        file.write(f"\n## {outcome.step.name}\n\n`{outcome.step}`\n\n````\n{text}\n````\n")
    for table in sorted(results.glob("*.csv")):
        file.write(f"\n## {table.name}\n\n````\n{table.read_text()}````\n")


@dataclass(frozen=True)
class Arguments:
    """Build, test and measure on the GPU of this machine, and write one report."""

    plan: bool = False
    """Print what would run, and run nothing."""

    report: Path = Path("out/gpu_report.md")
    """Where the report goes; the tables of the benchmarks go to a folder beside it."""

    seconds: float = LIMIT
    """After which no step goes on."""


def main(
    arguments: Arguments,
    found: Callable[[Path], Iterator[Step]] = steps,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Exit code: 0; 1 if a step failed."""
    results = arguments.report.parent / f"{arguments.report.stem}_results"
    if arguments.plan:
        for step in found(results):
            print(f"{step.name} (at most {step.limit:.0f} s)\n    {step}")
        return 0
    results.mkdir(parents=True, exist_ok=True)
    end, outcomes = clock() + arguments.seconds, list[Outcome]()
    for step in found(results):
        print(f"{step.name} ...", flush=True)
        outcomes.append(run(step, end - clock()))
        print(f"    {outcomes[-1].result}, {outcomes[-1].seconds:.0f} s", flush=True)
        with arguments.report.open("w") as file:  # after each step: a machine may be taken away
            write(outcomes, results, file)
    print(f"report: {arguments.report}")
    return 0 if all(outcome.result == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
