"""The cases and providers of `python -m benchmarks` as tests, verified and then timed by pytest-benchmark."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import _machine
from benchmarks.__main__ import OPS, load
from benchmarks._harness import Case, Provider, Trial

AnyTrial = Trial[Any]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case and provider; the providers of a case follow each other and are a group."""
    rows = []
    for op in OPS:
        benchmark = load(op)
        for case in benchmark.quick if metafunc.config.getoption("quick") else benchmark.cases:
            for provider in benchmark.providers:
                name = "-".join((op, *_sizes(case), provider.name))
                rows.append(pytest.param(f"{op} {case}", case, provider, id=name))
    metafunc.parametrize(("group", "trial", "provider"), rows, indirect=["trial"])


def _sizes(case: Case) -> list[str]:
    """Numbers with the names of their fields, and texts alone."""
    fields = dataclasses.asdict(case)  # type: ignore[call-overload]
    return [value if isinstance(value, str) else f"{name}{value}" for name, value in fields.items()]


@pytest.fixture(scope="module")
def trial(request: pytest.FixtureRequest) -> AnyTrial:
    """Inputs and the reference's result, made once for all providers of a case."""
    return Trial.of(request.param, _machine.device(request.config.getoption("device")))


@pytest.fixture
def threads(pytestconfig: pytest.Config) -> int:
    found: int = pytestconfig.getoption("threads")
    return found


def test_op(
    benchmark: BenchmarkFixture, group: str, trial: AnyTrial, provider: Provider[Any], threads: int
) -> None:
    """A result of ours must be right before it is timed; one of others says on how many rows it is not."""
    reason = trial.reason(provider)
    if reason is not None:
        pytest.skip(reason)
    call, wrong_rows = trial.build(provider, threads)
    assert wrong_rows == 0 or not provider.ours
    benchmark.group = group
    benchmark.extra_info.update(
        provider=provider.name, version=provider.version(), threads=threads, wrong_rows=wrong_rows
    )
    benchmark(_machine.synchronized(call, trial.inputs[0].device))
