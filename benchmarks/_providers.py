"""Providers that several benchmarks have, and how their results are compared."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks._harness import C, Call, Inputs, Provider, Unavailable, always
from hitsr_fast import __version__
from hitsr_fast.dispatch import operations, use_backend
from hitsr_fast.ops import active_instruction_set, instruction_sets, use_instruction_set

OpCall = tuple[str, tuple[Any, ...]]  # an op's name and its low-level arguments

# Of a result's largest value.
_ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def missing_compiler(*_case_and_inputs: object) -> str | None:
    """Why `torch.compile` has no CPU code to give, or None."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"needs a C++ compiler, found no {compiler}"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under `torch.compile`, for shapes that stay.

    What was compiled before is dropped: each case has shapes of its own, and their number is limited.
    """
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def rows_off(results: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype, rows: int = 1) -> int:
    """How many rows have a value that is off by more than 1e-5 (bfloat16: 2e-2) of a result's largest.

    Args:
        results: of which each begins with the same axes of rows.
        expected: the same in float64.
        dtype: that the results were computed in.
        rows: how many axes those are.
    """
    wrong = torch.zeros(expected[0].shape[:rows], dtype=torch.bool, device=expected[0].device)
    for found, wanted in zip(results, expected, strict=True):
        error = (found.double() - wanted).abs().flatten(rows).amax(rows)
        wrong |= ~(error <= _ALLOWED[dtype] * wanted.abs().max())
    return int(wrong.sum())


def ours(
    backend: str | None,
    build: Callable[[C, Inputs], Call],
    ops: Callable[[C, Inputs], Iterable[OpCall]],
    *,
    isa: str = "",
    variant: str = "",
    unavailable: Unavailable[C] = always,
) -> Provider[C]:
    """This package's ops on one backend, or on those that the dispatch chooses.

    Args:
        backend: its name, or None.
        build: of a case and its inputs, the call to time.
        ops: of the same, what the call runs: that decides whether the backend can.
        isa: the instruction set that the CPU's is held to, else it is the best there is.
        variant: ends the provider's name, where the backend has several.
        unavailable: what else speaks against a case.
    """

    def forced(case: C, inputs: Inputs) -> Call:
        with use_instruction_set(isa or None):
            call = build(case, inputs)

        def run() -> Any:
            with use_instruction_set(isa or None), use_backend(backend):
                return call()

        return run

    def reason(case: C, inputs: Inputs) -> str | None:
        found = unavailable(case, inputs)
        if found is not None or backend is None:
            return found
        if backend == "triton" and inputs[0].device.type == "cpu":
            return "Triton's interpreter is not worth timing"
        for op, arguments in ops(case, inputs):
            found = operations()[op].reasons(*arguments)[backend]
            if found is not None:
                return f"{op}: {found}"
        if isa and isa not in instruction_sets():
            return f"this machine has no {isa}, but {', '.join(instruction_sets())}"
        return None

    def version() -> str:
        with use_instruction_set(isa or None):
            return f"{__version__} {active_instruction_set()}" if backend == "cpu" else __version__

    name = ":".join(part for part in (backend or "auto", isa, variant) if part)
    return Provider(name, forced, reason, version, ours=True, limit=isa if isa == "avx2" else "")


def our_backends(
    build: Callable[[C, Inputs], Call],
    ops: Callable[[C, Inputs], Iterable[OpCall]],
    backends: Sequence[str | None] = ("reference", "cpu", "triton", None),
) -> tuple[Provider[C], ...]:
    """`ours` on each of the backends."""
    return tuple(ours(backend, build, ops) for backend in backends)
