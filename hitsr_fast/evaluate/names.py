"""Names of sets, methods and images, and what they are as files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from hitsr_fast.evaluate.errors import EvaluationError
from hitsr_fast.evaluate.layouts import shown

TRUTH: Final = "HR"  # where saved ground truth lies, in place of a method's name, and its column on the sheet
INPUT: Final = "input"  # the column of the input on the sheet


def file_name(name: str) -> str:
    """A name of a method, a set or an image as that of a file."""
    return re.sub(r"[^\w.+=@ -]", "_", name).strip(" .") or "_"


def check_names(kind: str, names: Sequence[str]) -> None:
    """Raise EvaluationError where two sets or two methods have one name."""
    if len(set(names)) < len(names):
        raise EvaluationError(f"{kind}s: expected different names, found {list(names)}")


def check_file_names(what: str, names: Sequence[str]) -> None:
    """Raise EvaluationError where two names are one as those of files, on any file system."""
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(file_name(name).casefold(), []).append(name)
    if same := [name for group in files.values() if len(group) > 1 for name in group]:
        raise EvaluationError(f"{what}: expected names that differ as those of files, found {shown(same)}")


def check_method_names(names: Sequence[str], *, saved: bool, drawn: bool) -> None:
    """Raise EvaluationError where methods cannot be told apart, or from what lies beside them.

    Args:
        names: of the methods.
        saved: whether the results are saved, perhaps beside the ground truth.
        drawn: whether they are drawn on a sheet, beside input and ground truth.
    """
    check_names("method", names)
    taken = [name for name in names if drawn and name in (INPUT, TRUTH)]
    taken += [name for name in names if saved and file_name(name).casefold() == TRUTH.casefold()]
    if taken:
        kept = f"{INPUT} and {TRUTH} are what they are compared with"
        raise EvaluationError(f"methods: expected other names than {taken[0]}: {kept}")
    if saved:
        check_file_names("methods", names)
