"""A bar chart of speed-ups from a file of results."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks._harness import missing_package

_OURS, _PEER = "tab:blue", "tab:gray"
_CONDITIONS = ("cpu_model", "instruction_sets", "torch", "threads", "load", "date", "commit")
Row = dict[str, str]


class PlotError(RuntimeError):
    """Nothing can be drawn; the message says why."""


def plot(rows: Sequence[Row], device: str, out: Path) -> None:
    """Draw a bar for each provider of each case: its speed over that of the best peer.

    Args:
        rows: of one op.
        device: whose rows to take.
        out: file; its suffix is the format.

    Raises:
        PlotError: matplotlib is missing, or there is no measured row of the device.
    """
    shown = [row for row in rows if row["device"] == device and row["speedup"]]
    if not shown:
        devices = ", ".join(sorted({row["device"] for row in rows})) or "none"
        raise PlotError(f"device: expected one that was measured ({devices}), found {device!r}")
    reason = missing_package("matplotlib")
    if reason:
        raise PlotError(f"{reason}; pip install 'hitsr-fast[bench]'")
    cases = list(dict.fromkeys(case_name(row) for row in shown))
    heights = [sum(case_name(row) == case for row in shown) for case in cases]
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(9, 1.2 + sum(0.32 * height + 0.7 for height in heights)), layout="constrained"
    )
    axes = figure.subplots(len(cases), squeeze=False, height_ratios=heights)[:, 0]
    for axis, case in zip(axes, cases, strict=True):
        bars = [row for row in shown if case_name(row) == case]
        speedups = [float(row["speedup"]) for row in bars]
        drawn = axis.barh(
            [row["provider"] for row in bars],
            speedups,
            color=[_OURS if row["role"] == "ours" else _PEER for row in bars],
            hatch=["//" if int(row["wrong_rows"]) else "" for row in bars],
        )
        axis.bar_label(drawn, [_label(row) for row in bars], padding=3, fontsize="small")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlim(0, max(speedups) * 1.6)
        axis.set_title(case, loc="left", fontsize="medium")
        axis.invert_yaxis()
    figure.suptitle(f"{shown[0]['op']}: speed over the best peer")
    figure.supxlabel(_caption(shown, device), fontsize="x-small")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def case_name(row: Row) -> str:
    """The columns of a row that are its case."""
    names = list(row)
    case = names[names.index("op") + 1 : names.index("provider")]
    return " ".join(f"{name}={row[name]}" for name in case)


def _label(row: Row) -> str:
    label = f"{float(row['speedup']):.2f}x {row['best_peer']}, {float(row['median_ms']):.3g} ms"
    return f"{label}, {row['reason']}" if row["reason"] else label


def _caption(rows: Sequence[Row], device: str) -> str:
    facts = (f"{name} {' / '.join(sorted({row[name] for row in rows}))}" for name in _CONDITIONS)
    return textwrap.fill(f"device {device}; {'; '.join(facts)}", width=120)
