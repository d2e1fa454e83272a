"""The command line `python -m benchmarks COMMAND OP`."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks._audit import Finding
    from benchmarks._harness import Benchmark
    from benchmarks._records import Record

_HERE = Path(__file__).parent
_MODULES = {
    path.stem.removeprefix("bench_"): ".".join((*path.relative_to(_HERE.parent).parts[:-1], path.stem))
    for path in sorted((*_HERE.glob("ops/bench_*.py"), *_HERE.glob("bench_*.py")))
}
OPS = tuple(sorted(_MODULES))

_IDLE_LOAD = 0.5
_QUIET_CONTENTION = 1.25


@dataclass(frozen=True)
class Run:
    """Measure an op's providers against each other, and save a row for each.

    Results are compared with the reference first. Providers that cannot run here are rows with the reason.
    """

    op: tyro.conf.Positional[str]
    """Name of the op."""

    quick: bool = False
    """Tiny cases, which show that everything runs; saved only where --results says."""

    threads: int = 2
    """Of every library; OMP_NUM_THREADS must be the same, or not be set."""

    providers: tuple[str, ...] = ()
    """Only these. Speed-ups are over the peers that take part."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto is cuda where there is a device."""

    repeats: int | None = None
    """Timed calls of each provider; by default 15, and 1001 of dispatch."""

    results: Path | None = None
    """File to save to; by default benchmarks/results/OP.csv."""

    def run(self) -> int:
        """Measure; 0, 1 if one of our results is wrong, or 2 if the run cannot be made."""
        os.environ.setdefault("OMP_NUM_THREADS", str(self.threads))  # read as libraries are loaded, below
        from benchmarks import _machine, _records

        if self.repeats is not None and self.repeats < 1:
            return _refuse(f"--repeats: expected at least 1, found {self.repeats}")
        path = self.results or (None if self.quick else _records.RESULTS / f"{self.op}.csv")
        benchmark, wrong = load(self.op), 0
        rows: list[dict[str, str]] = []
        try:
            for records in benchmark.run(
                threads=self.threads,
                device=_machine.device(self.device),
                repeats=self.repeats,
                quick=self.quick,
                providers=self.providers,
            ):
                _print(records)
                if path:
                    _records.save(path, records)
                rows += [record.row() for record in records]
                wrong += sum(record.wrong_rows or 0 for record in records if record.role == "ours")
        except (_machine.MachineError, ValueError) as error:
            return _refuse(str(error))
        if benchmark.summary is not None:
            print(f"\n{benchmark.summary(rows)}", end="")
        return 1 if wrong else 0


@dataclass(frozen=True)
class Plot:
    """Draw speed-ups over the best peer from saved results, as a bar chart."""

    op: tyro.conf.Positional[str]
    """Name of the op."""

    device: str = "cpu"
    """Whose rows: cpu, or the name of a GPU as it stands in the results."""

    results: Path | None = None
    """File to read; by default benchmarks/results/OP.csv."""

    out: Path | None = None
    """Picture to write, .png or .svg; by default beside the results."""

    def run(self) -> int:
        """Draw; 0, or 2 if there is nothing to draw or no matplotlib."""
        from benchmarks import _plot, _records

        results = self.results or _records.RESULTS / f"{self.op}.csv"
        out = self.out or results.with_suffix(".png")
        if not results.is_file():
            return _refuse(f"--results: expected a file of results, found no {results}")
        if out.suffix not in (".png", ".svg"):
            return _refuse(f"--out: expected a .png or .svg file, found {out}")
        try:
            _plot.plot(_records.read(results), self.device, out)
        except _plot.PlotError as error:
            return _refuse(str(error))
        print(f"wrote {out}")
        return 0


@dataclass(frozen=True)
class Audit:
    """Compile an op's Triton kernels for chips that are not here, and say what they take.

    What stands in the compiled code is counted; occupancy and floor are predictions, and marked as such.
    """

    op: tyro.conf.Positional[str]
    """Name of the op."""

    targets: tuple[str, ...] = ()
    """Only these, such as sm_90; all if none is given."""

    def run(self) -> int:
        """Print the tables; 0, or 2 if there is nothing to compile or no compiler."""
        from benchmarks._harness import missing_package

        plan = load(self.op).audit
        reason = next((text for name in ("triton", "pytest") if (text := missing_package(name))), None)
        if plan is None or reason:
            return _refuse(f"{self.op}: {reason or 'it has no Triton kernels'}")
        from benchmarks import _audit

        unknown = [name for name in self.targets if name not in _audit.CHIPS]
        if unknown:
            return _refuse(f"--targets: expected some of {', '.join(_audit.CHIPS)}, found {unknown[0]!r}")
        widths = (8, 10, 37, 10, 8, 8, 10, 23, 22)
        titles = (
            "registers",
            "shared",
            "spilled",
            "per score",
            "occupancy (predicted)",
            "floor ms (predicted)",
        )
        for case in plan.cases:
            print(f"\n{self.op} {case}; compiled, not run")
            print(_line(("target", "chip", "kernel", *titles), widths, texts=3))
            for found in _audit.audit(plan, case, self.targets or tuple(_audit.CHIPS)):
                print(_line(_cells(found), widths, texts=3).rstrip())
        return 0


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Audit, tyro.conf.subcommand("audit")]
)


def main(args: list[str] | None = None) -> None:
    """Parse the command line, run the command and exit with its code."""
    command: Command = tyro.cli(
        Command, prog="python -m benchmarks", description="Benchmarks of the ops.", args=args
    )
    if command.op not in OPS:
        sys.exit(_refuse(f"op: expected one of {', '.join(OPS)}, found {command.op!r}"))
    sys.exit(command.run())


def _refuse(message: str) -> int:
    print(f"benchmarks: {message}", file=sys.stderr)
    return 2


def load(op: str) -> Benchmark[Any]:
    """The benchmark of that name."""
    found: Benchmark[Any] = importlib.import_module(_MODULES[op]).BENCHMARK
    return found


def _print(records: Sequence[Record]) -> None:
    case = " ".join(f"{name}={value}" for name, value in records[0].case.items())
    found = records[0].conditions
    disturbed = [record.provider for record in records if (record.contention or 1) > _QUIET_CONTENTION]
    print(f"\n{records[0].op} {case}")
    print(
        f"{found.device}, {found.cpu_model}, {found.instruction_sets}\n"
        f"{found.threads} threads, load {found.load} at the start, "
        f"matrix products at {records[0].gemm_gflops:.0f} GFLOP/s"
    )
    if found.load > _IDLE_LOAD or disturbed:
        beside = f", beside {', '.join(disturbed)}" if disturbed else ""
        print(f"others were busy{beside}: do not trust the times")
    widths = (24, 24, 10, 10, 11, 9, 11, 10, 11)
    slowest = max((record.times.median_ms for record in records if record.times), default=1.0)
    unit, units = ("ms", 1) if slowest >= 1 else ("us", 1000)
    titles = (
        *("provider", "version", f"median {unit}", f"min {unit}"),
        *("per second", "speed-up", "x floor", "extra MiB", "contention"),
    )
    print(_line(titles, widths, texts=2))
    for record in records:
        times = record.times
        numbers = (
            times.median_ms * units if times else None,
            times.min_ms * units if times else None,
            record.per_second,
            record.speedup,
            record.times_floor,
            record.peak_extra_mib,
            record.contention,
        )
        cells = ["" if number is None else f"{number:.4g}" for number in numbers]
        print(
            f"{_line((record.provider, record.version, *cells), widths, texts=2)}  {record.reason}".rstrip()
        )


def _cells(found: Finding) -> list[str]:
    numbers = (found.registers, found.shared, found.spilled, found.per_score, found.occupancy, found.floor_ms)
    return [
        found.target,
        found.chip,
        found.kernel,
        *(
            "" if value is None else f"{value:.5g}" if isinstance(value, float) else f"{value}"
            for value in numbers
        ),
    ]


def _line(cells: Sequence[str], widths: Sequence[int], *, texts: int) -> str:
    """The first ones are texts and stand to the left; the others are numbers and stand to the right."""
    padded = zip(cells, widths, strict=True)
    return "".join(
        f"{cell:<{width}}" if place < texts else f"{cell:>{width}}"
        for place, (cell, width) in enumerate(padded)
    )


if __name__ == "__main__":
    main()
