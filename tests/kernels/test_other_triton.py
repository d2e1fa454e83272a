"""The audit on the Triton of torch's floor and on the newest one; both are fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.other_triton import FLOOR, NEWEST, install, pytest_on


@pytest.mark.slow
@pytest.mark.parametrize("requirement", [FLOOR, NEWEST])
def test_what_the_ordinary_run_compiles(requirement: str, tmp_path: Path) -> None:
    """Nothing spills there either, and every launch is accepted."""
    install(requirement, tmp_path)
    assert pytest_on(tmp_path, "-x", "-q", "-m", "not slow", "tests/kernels") == 0
