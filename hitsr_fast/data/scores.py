"""Which images of a set are of low quality, by the scores that a CSV file has for them."""

from __future__ import annotations

import csv
import math
import posixpath
from collections.abc import Sequence
from pathlib import Path

from hitsr_fast.data.source_config import SourceConfig


class Scores:
    """Scores of images, and the threshold below which one is of low quality.

    Args:
        config: `scores`, `score_file`, `score`, `below` and `below_share`.
        root: What the file is relative to.

    Attributes:
        threshold: As given, or the least score + below_share * (the greatest - the least).

    Raises:
        ValueError: The file is missing or no CSV file in UTF-8, has no such column, a line without a name, a
            score that is no number or two of one image.
    """

    def __init__(self, config: SourceConfig, root: Path) -> None:
        self.path = root / config.scores
        self._scores: dict[str, float] = {}
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                self._read(csv.DictReader(file), config)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(f"scores: expected a CSV file, found {reason}: {str(self.path)!r}") from error
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path}: expected a CSV file in UTF-8: {error}") from error
        if not self._scores:
            raise ValueError(f"{self.path}: expected scores of images, found none")
        low, high = min(self._scores.values()), max(self._scores.values())
        share = config.below_share
        self.threshold = low + share * (high - low) if share is not None else float(config.below or 0.0)

    def rows(self, names: Sequence[str], negative: bool) -> list[int]:
        """Which of some images are negative, or which are not; those without a score are neither.

        Raises:
            ValueError: None of the images has a score.
        """
        found = [(row, self._score(name)) for row, name in enumerate(names)]
        scored = [(row, score) for row, score in found if score is not None]
        if names and not scored:
            first = next(iter(self._scores))
            raise ValueError(
                f"{self.path}: expected scores of images like {names[0]!r}, found {first!r} and such"
            )
        return [row for row, score in scored if (score < self.threshold) == negative]

    def _score(self, name: str) -> float | None:
        base = posixpath.basename(name)
        for key in (name, base, posixpath.splitext(base)[0]):
            if key in self._scores:
                return self._scores[key]
        return None

    def _read(self, lines: csv.DictReader[str], config: SourceConfig) -> None:
        columns = lines.fieldnames or []
        for column in (config.score_file, config.score):
            if column not in columns:
                raise ValueError(
                    f"{self.path}: expected a column {column!r}, found {', '.join(columns) or 'none'}"
                )
        for line in lines:
            name, text = line[config.score_file], line[config.score] or ""
            if not name:
                raise ValueError(
                    f"{self.path}: expected the name of an image in line {lines.line_num}, found none"
                )
            try:
                score = float(text)
            except ValueError:
                score = math.nan
            if not math.isfinite(score):
                raise ValueError(f"{self.path}: expected a number in line {lines.line_num}, found {text!r}")
            if self._scores.setdefault(name, score) != score:
                raise ValueError(
                    f"{self.path}: expected one score of {name!r}, found {self._scores[name]} and {score}"
                )
