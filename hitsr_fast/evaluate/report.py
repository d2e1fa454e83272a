"""Results of an evaluation, and the files they are written to."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from hitsr_fast.evaluate.sets import EvaluationError

COLUMNS = ("set", "scale", "method", "images", "PSNR-Y", "SSIM-Y", "LPIPS")


@dataclass(frozen=True)
class Score:
    """The result of a method on one image.

    Args:
        set: the test set.
        scale: size of the result over size of the input.
        method: the method.
        image: the image.
        psnr_y: dB on luma, infinite for equal images.
        ssim_y: on luma; NaN where the image is too small for the metric.
        lpips: AlexNet; NaN where the image is too small for the metric.
    """

    set: str
    scale: int
    method: str
    image: str
    psnr_y: float
    ssim_y: float
    lpips: float


@dataclass(frozen=True)
class MeanScore:
    """The mean result of a method on a set; as `Score`, with the number of images in place of the image."""

    set: str
    scale: int
    method: str
    images: int
    psnr_y: float
    ssim_y: float
    lpips: float


@dataclass(frozen=True)
class Report:
    """All results of an evaluation.

    Args:
        scores: one per set, image, scale and method.
        notes: what was left out and why.
        settings: what the results depend on besides methods and images; kept in the JSON file.
    """

    scores: tuple[Score, ...]
    notes: tuple[str, ...]
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def means(self) -> list[MeanScore]:
        """Means over the images of each set, scale and method; sets and methods as they first appear."""
        groups: dict[tuple[str, int, str], list[Score]] = {}
        for score in self.scores:
            groups.setdefault((score.set, score.scale, score.method), []).append(score)
        sets = list(dict.fromkeys(name for name, _, _ in groups))
        ordered = sorted(groups.items(), key=lambda item: (sets.index(item[0][0]), item[0][1]))
        return [
            MeanScore(
                *key,
                images=len(group),
                psnr_y=_mean([score.psnr_y for score in group]),
                ssim_y=_mean([score.ssim_y for score in group]),
                lpips=_mean([score.lpips for score in group]),
            )
            for key, group in ordered
        ]

    def save(self, path: Path) -> None:
        """Write the report in the format that the suffix of `path` names; never half of it.

        Args:
            path: `.json` (means, images and notes), `.csv` or `.md` (means).

        Raises:
            EvaluationError: another suffix.
        """
        check_report_path(path)
        write = {".json": self._json, ".csv": self._csv, ".md": self.markdown}[path.suffix]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(write(), encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def markdown(self) -> str:
        """The means as a Markdown table."""
        rows = [COLUMNS, ("---",) * len(COLUMNS), *map(format_mean, self.means())]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([column.name for column in fields(MeanScore)])
        writer.writerows(asdict(score).values() for score in self.means())
        return text.getvalue()

    def _json(self) -> str:
        means = [dict(_plain(score)) for score in self.means()]
        images = [dict(_plain(score)) for score in self.scores]
        report = {"means": means, "images": images, "notes": self.notes, "settings": dict(self.settings)}
        return json.dumps(report, indent=1, allow_nan=False) + "\n"


def check_report_path(path: Path) -> None:
    """Raise EvaluationError unless the suffix of `path` names a format that `Report.save` writes."""
    if path.suffix not in (".json", ".csv", ".md"):
        raise EvaluationError(f"{path}: expected a name that ends in .json, .csv or .md")


def format_mean(score: MeanScore) -> tuple[str, ...]:
    """The cells of the table's row, see `COLUMNS`."""
    numbers = (f"{score.psnr_y:.2f}", f"{score.ssim_y:.4f}", f"{score.lpips:.4f}")
    measured = (number.replace("nan", "-") for number in numbers)
    return (score.set, f"x{score.scale}", score.method, str(score.images), *measured)


def _mean(values: Sequence[float]) -> float:
    """Mean of the measured values; NaN when none was measured."""
    measured = [value for value in values if not math.isnan(value)]
    return math.fsum(measured) / len(measured) if measured else math.nan


def _plain(score: Score | MeanScore) -> Iterator[tuple[str, str | int | float | None]]:
    """Fields of a score in strict JSON: null where nothing was measured, "inf" for infinity."""
    for key, value in asdict(score).items():
        if isinstance(value, float) and not math.isfinite(value):
            value = None if math.isnan(value) else "inf"
        yield key, value
