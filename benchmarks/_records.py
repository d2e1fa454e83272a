"""Results: one CSV row for each measurement."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._machine import Conditions

RESULTS = Path(__file__).parent / "results"
_OWN_KEY = ("op", "provider", "device")


@dataclass(frozen=True)
class Times:
    """Milliseconds of the timed calls."""

    median_ms: float
    min_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int


@dataclass(frozen=True)
class Record:
    """One provider on one case; what could not be measured is None, and `reason` says why.

    Attributes:
        op: name of the op.
        case: sizes of the call.
        provider: name of the implementation.
        role: "ours" or "peer".
        version: of the implementation's library, with the instruction set where one was chosen.
        times: of the calls.
        wrong_rows: rows whose result is not that of the reference.
        best_peer: the quickest provider of this run that is not ours and has the same limit.
        speedup: median of the best peer over this median; above 1 is quicker than every peer.
        per_second: rows or images of the call over the median.
        gemm_gflops: measured rate of matrix products in this run.
        times_floor: median over the time in which such products do the flop of the case.
        peak_extra_mib: memory that a call holds at its peak.
        contention: mean time of a small fixed work beside the calls, over its least in the case; it belongs
            at 1.
        reason: why nothing was measured, or what is wrong.
        conditions: of the run.
        figures: more columns, of the case.
    """

    op: str
    case: Mapping[str, Any]
    provider: str
    role: str
    version: str
    times: Times | None
    wrong_rows: int | None
    best_peer: str
    speedup: float | None
    per_second: float | None
    gemm_gflops: float
    times_floor: float | None
    peak_extra_mib: float | None
    contention: float | None
    reason: str
    conditions: Conditions
    figures: Mapping[str, object] = field(default_factory=dict)

    def row(self) -> dict[str, str]:
        """Columns as text; empty for None."""
        times = asdict(self.times) if self.times else dict.fromkeys(Times.__annotations__)
        columns = {
            "op": self.op,
            **self.case,
            "provider": self.provider,
            "role": self.role,
            "version": self.version,
            **times,
            "wrong_rows": self.wrong_rows,
            "best_peer": self.best_peer,
            "speedup": self.speedup,
            "per_second": self.per_second,
            "gemm_gflops": self.gemm_gflops,
            "times_floor": self.times_floor,
            "peak_extra_mib": self.peak_extra_mib,
            "contention": self.contention,
            **self.figures,
            **asdict(self.conditions),
            "reason": self.reason,
        }
        return {name: _text(value) for name, value in columns.items()}


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a file of results."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def save(path: Path, records: Iterable[Record]) -> None:
    """Write records to a file of results, in place of its rows of the same op, case, provider and device."""
    records = list(records)
    rows = read(path) if path.exists() else []
    key = (*_OWN_KEY, *records[0].case)
    table = {tuple(row[name] for name in key): row for row in [*rows, *(record.row() for record in records)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".csv.part")
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0].row()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())
    os.replace(draft, path)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
