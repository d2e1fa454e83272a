"""Options of `pytest benchmarks`; those of the tool itself begin with `--benchmark`."""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ops")
    group.addoption("--quick", action="store_true", help="tiny cases, which show that everything runs")
    group.addoption(
        "--threads", type=int, default=2, help="of every library, as OMP_NUM_THREADS (default: 2)"
    )
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")


def pytest_configure(config: pytest.Config) -> None:
    threads = config.getoption("threads")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # read as libraries are loaded, below
    from benchmarks import _machine

    try:
        _machine.require_threads(threads)
        _machine.device(config.getoption("device"))
    except _machine.MachineError as error:
        raise pytest.UsageError(str(error)) from error
