"""The predictions that docs/gpu.md shows are those of the code, and called predictions."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import predictions
from benchmarks._audit import CHIPS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"


def test_the_docs_show_them() -> None:
    text = DOCS.read_text()
    assert predictions.table() in text, "docs/gpu.md: expected what python -m benchmarks.predictions prints"
    assert predictions.memory_table() in text
    assert "No kernel of this package has run on a GPU yet" in text and "never measured" in text


def test_every_chip_of_the_audit_has_a_bandwidth() -> None:
    assert set(predictions.BANDWIDTH) == set(CHIPS) > set(predictions.SHOWN)


def test_what_a_degradation_does_is_counted() -> None:
    launches, megabytes = predictions.counted(predictions.DEGRADE)
    assert launches == pytest.approx(predictions.DEGRADE_LAUNCHES, rel=0.1)
    assert megabytes == pytest.approx(predictions.DEGRADE_MB, rel=0.05)


def test_a_time_is_the_longest_of_its_parts() -> None:
    def time(**changed: float) -> float:
        work = {"launches": 0, "megabytes": 0.0, "products": 0.0, "lanes": 0.0} | changed
        return predictions.Work("op", "case", formula="", **work).milliseconds("sm_90")  # type: ignore[arg-type]

    parts = {"megabytes": 335.0, "products": 989.0, "lanes": 30.9}
    expected = {"megabytes": 0.125, "products": 2.5, "lanes": 2.0}
    for name, value in parts.items():
        assert time(**{name: value}) == pytest.approx(expected[name], rel=0.01)
    assert time(**parts, launches=4) == pytest.approx(2.5 + 4 * predictions.LAUNCH_US / 1e3)
