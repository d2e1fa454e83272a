"""Providers that several benchmarks have."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from benchmarks._harness import C, Call, Provider
from hitsr_fast import __version__
from hitsr_fast.dispatch import operations, use_backend

Inputs = tuple[Tensor, ...]
OpCall = tuple[str, tuple[Any, ...]]  # an op's name and its low-level arguments


def missing_compiler(*_case_and_inputs: object) -> str | None:
    """Why `torch.compile` has no CPU code to give, or None."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"needs a C++ compiler, found no {compiler}"


def ours(
    backend: str | None,
    build: Callable[[C, Inputs], Call],
    ops: Callable[[C, Inputs], Iterable[OpCall]],
    version: Callable[[], str] = lambda: __version__,
) -> Provider[C]:
    """This package's ops on one backend, or on those that the dispatch chooses.

    Args:
        backend: its name, or None.
        build: of a case and its inputs, the call to time.
        ops: of the same, what the call runs: that decides whether the backend can.
        version: see `Provider`.
    """

    def forced(case: C, inputs: Inputs) -> Call:
        call = build(case, inputs)

        def run() -> Any:
            with use_backend(backend):
                return call()

        return run

    def unavailable(case: C, inputs: Inputs) -> str | None:
        if backend is None:
            return None
        if backend == "triton" and inputs[0].device.type == "cpu":
            return "Triton's interpreter is not worth timing"
        for op, arguments in ops(case, inputs):
            reason = operations()[op].reasons(*arguments)[backend]
            if reason is not None:
                return f"{op}: {reason}"
        return None

    return Provider(backend or "auto", forced, unavailable, version, ours=True)
