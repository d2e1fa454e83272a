"""Results of an evaluation, and the files they are written to."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from hitsr_fast.evaluate.errors import EvaluationError
from hitsr_fast.evaluate.layouts import shown

_HEAD: Final = ("set", "scale", "method", "images")


class Row(NamedTuple):
    """Which row of the table a number belongs to."""

    set: str
    scale: int
    method: str


class Cells(Protocol):
    """A column as a report needs it, see `protocols.Column`."""

    @property
    def key(self) -> str:
        """Its name in CSV and JSON files."""

    @property
    def title(self) -> str:
        """Its name in tables."""

    def format(self, value: float) -> str:
        """A cell."""


@dataclass(frozen=True)
class Score:
    """The result of a method on one image.

    Args:
        set: the test set.
        scale: size of the result over size of the input.
        method: the method.
        image: the image.
        values: by the key of the column; NaN where there is nothing to measure.
    """

    set: str
    scale: int
    method: str
    image: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class MeanScore:
    """The mean result of a method on a set; as `Score`, with the number of images in place of the image."""

    set: str
    scale: int
    method: str
    images: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """All results of an evaluation.

    Args:
        scores: one per set, image, scale and method.
        notes: what was left out and why.
        settings: what the results depend on besides methods and images; kept in the JSON file.
        columns: of the table, in order.
        set_values: numbers that belong to a whole set, by row and key.
        tables: what else the JSON file holds, by name: lists of entries.
    """

    scores: tuple[Score, ...]
    notes: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    columns: tuple[Cells, ...] = ()
    set_values: Mapping[Row, Mapping[str, float]] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def head(self) -> tuple[str, ...]:
        """Titles of the table's columns."""
        return (*_HEAD, *(column.title for column in self.columns))

    def means(self) -> list[MeanScore]:
        """Means over the images of each set, scale and method; sets and methods as they first appear."""
        groups: dict[Row, list[Score]] = {}
        for score in self.scores:
            groups.setdefault(Row(score.set, score.scale, score.method), []).append(score)
        sets = list(dict.fromkeys(row.set for row in groups))
        ordered = sorted(groups.items(), key=lambda item: (sets.index(item[0].set), item[0].scale))
        return [MeanScore(*row, len(group), self._values(row, group)) for row, group in ordered]

    def _values(self, row: Row, group: Sequence[Score]) -> dict[str, float]:
        own = self.set_values.get(row, {})
        return {
            column.key: own[column.key]
            if column.key in own
            else _mean([score.values.get(column.key, math.nan) for score in group])
            for column in self.columns
        }

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, one row per mean; see `head`."""
        return [
            (
                *(mean.set, f"x{mean.scale}", mean.method, str(mean.images)),
                *(column.format(mean.values[column.key]) for column in self.columns),
            )
            for mean in self.means()
        ]

    def save(self, path: Path) -> None:
        """Write the report in the format that the suffix of `path` names; never half of it.

        Args:
            path: `.json` (means, images and notes), `.csv` or `.md` (means).

        Raises:
            EvaluationError: another suffix.
        """
        check_report_path(path)
        write_text(path, {".json": self._json, ".csv": self._csv, ".md": self.markdown}[path.suffix]())

    def markdown(self) -> str:
        """The means as a Markdown table."""
        rows = [self.head, ("---",) * len(self.head), *self.rows()]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*_HEAD, *(column.key for column in self.columns)])
        for mean in self.means():
            values = [mean.values[column.key] for column in self.columns]
            writer.writerow([mean.set, mean.scale, mean.method, mean.images, *values])
        return text.getvalue()

    def _json(self) -> str:
        means = [_plain(score, images=score.images) for score in self.means()]
        images = [_plain(score, image=score.image) for score in self.scores]
        report: dict[str, Any] = {"means": means, "images": images, **self.tables}
        report |= {"notes": self.notes, "settings": dict(self.settings)}
        return json.dumps(report, indent=1, allow_nan=False) + "\n"


def check_report_path(path: Path) -> None:
    """Raise EvaluationError unless the suffix of `path` names a format that `Report.save` writes."""
    if path.suffix not in (".json", ".csv", ".md"):
        raise EvaluationError(f"{path}: expected a name that ends in .json, .csv or .md")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; missing folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def left_out(name: str, reasons: Mapping[tuple[int, str], Sequence[str]], images: int) -> Iterator[str]:
    """Notes on the images of a set that could not be measured: one per scale and reason.

    Args:
        name: of the set.
        reasons: by scale and reason, the images.
        images: how many the set has.
    """
    for (scale, reason), found in reasons.items():
        yield f"{name} x{scale}: {reason}, left out: {shown(found) if len(found) < images else 'all'}"


def _mean(values: Sequence[float]) -> float:
    """Mean of the measured values; NaN when none was measured."""
    measured = [value for value in values if not math.isnan(value)]
    return math.fsum(measured) / len(measured) if measured else math.nan


def strict(value: float) -> float | str | None:
    """A number in strict JSON: null where nothing was measured, "inf" for infinity."""
    if math.isfinite(value):
        return value
    return None if math.isnan(value) else "inf"


def _plain(score: Score | MeanScore, **own: int | str) -> dict[str, Any]:
    values = {key: strict(value) for key, value in score.values.items()}
    return {"set": score.set, "scale": score.scale, "method": score.method, **own, **values}
