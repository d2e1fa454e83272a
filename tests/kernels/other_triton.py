"""Tests of this folder on another Triton than the one that is installed; it goes to a folder of its own.

    python -m tests.kernels.other_triton triton==3.6.0 tests/kernels/test_aot.py -k sm_120

What follows the requirement, which pip reads, is pytest's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

FLOOR = "triton==3.6.0"  # what torch 2.10 was released with, the oldest torch that is supported
NEWEST = "triton"

_ROOT = Path(__file__).parents[2]


def install(requirement: str, folder: Path) -> None:
    """Triton alone, by pip."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(folder), requirement], check=True)


def pytest_on(folder: Path, *options: str) -> int:
    """Run pytest with the Triton of a folder; the exit code."""
    path = os.pathsep.join(map(str, (folder, _ROOT)))
    command = [sys.executable, "-m", "pytest", *options]
    return subprocess.run(command, cwd=_ROOT, env=os.environ | {"PYTHONPATH": path}, check=False).returncode


if __name__ == "__main__":
    wanted, *rest = sys.argv[1:] or [FLOOR]
    with tempfile.TemporaryDirectory() as place:
        install(wanted, Path(place))
        sys.exit(pytest_on(Path(place), *(rest or ["tests/kernels"])))
