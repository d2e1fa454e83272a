"""Finished scores in a file, so that an evaluation that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from hitsr_fast.evaluate.errors import EvaluationError
from hitsr_fast.evaluate.report import strict


class Finished(NamedTuple):
    """What is known of one result, whatever its set and image are called: the numbers by column, what was
    done to the image that is not a matter of course, why numbers are missing, and of its file, if it was
    saved, the fingerprint."""

    values: dict[str, float]
    notes: list[str]
    missing: list[str]
    picture: str = ""


class Journal:
    """Finished scores by the digest of all that they depend on; one line of JSON each, added as they come.

    Args:
        path: the file; made with the first score. Lines of other settings stay, and are of no use to this
            run; a line that an interrupted write has left torn is passed over.

    Raises:
        EvaluationError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, Finished] = {}
        self._whole = True
        try:
            text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
        except OSError as error:
            raise EvaluationError(f"{path}: {error.strerror or error}") from error
        for line in text.splitlines():
            self._take(line)
        self._whole = not text or text.endswith("\n")

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
            values = {key: _number(value) for key, value in entry["values"].items()}
            notes, missing = ([str(note) for note in entry[name]] for name in ("notes", "missing"))
            self._found[entry["key"]] = Finished(values, notes, missing, str(entry["picture"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            return

    def get(self, key: str) -> Finished | None:
        """The score of that key; None if it is not finished."""
        return self._found.get(key)

    def add(self, key: str, finished: Finished, **where: str | int) -> None:
        """Keep a score; `where` says in words whose it is."""
        self._found[key] = finished
        values = {name: strict(value) for name, value in finished.values.items()}
        entry = {"key": key, **where, **finished._asdict(), "values": values}
        line = json.dumps(entry, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n" if self._whole else f"\n{line}\n")
        self._whole = True


def journal_path(out: Path) -> Path:
    """Where the finished scores of a table are kept: beside it."""
    return out.with_name(f"{out.name}.scores.jsonl")


def digest_of(*parts: Any) -> str:
    """Of plain values, in their order."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)
