"""The one harness of all ops: every result is compared with the reference, then all are timed in turns."""

from __future__ import annotations

import importlib.util
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from benchmarks import _machine
from benchmarks._machine import Conditions, MachineError, Timer
from benchmarks._records import Record, Times

_WARM_UP = 2
_SLOW_MS = 2000.0
_CANARY = "canary"
_GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
_QUICK_GEMM_SIZE = 128


class Case(ABC):
    """One call: a frozen dataclass, whose fields are columns of the results."""

    @property
    @abstractmethod
    def flops(self) -> int:
        """Floating-point operations that the call cannot do without; 0 where they say nothing of its time."""

    @property
    @abstractmethod
    def items(self) -> int:
        """What the call gets through, for the rate: rows, images."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why no provider is measured on such a device, or None."""
        return None

    @abstractmethod
    def inputs(self, device: torch.device) -> Inputs:
        """Tensors to call with, the same each time."""

    @abstractmethod
    def expected(self, *inputs: Tensor) -> Any:
        """What the reference makes of them."""

    @abstractmethod
    def wrong_rows(self, result: Any, expected: Any) -> int:
        """Rows of a result that differ from the reference."""

    def figures(self, device: torch.device, threads: int, measured: bool) -> Mapping[str, object]:
        """More columns of the results, the same ones in all cases of a benchmark.

        Args:
            device: that the case ran on.
            threads: of every library.
            measured: whether a provider ran.
        """
        return {}

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())  # type: ignore[call-overload]


C = TypeVar("C", bound=Case)
Call = Callable[[], Any]
Inputs = tuple[Tensor, ...]
Unavailable = Callable[[C, Inputs], "str | None"]


def always(case: Case, inputs: Inputs) -> str | None:
    """`unavailable` of a provider that runs everywhere."""
    return None


def package_version(distribution: str) -> Callable[[], str]:
    """A provider's `version`."""
    return lambda: metadata.version(distribution)


_torch_version = package_version("torch")


def torch_threads(threads: int) -> int:
    """Set PyTorch's threads; what it then says it uses."""
    torch.set_num_threads(threads)
    return torch.get_num_threads()


@dataclass(frozen=True)
class Provider(Generic[C]):
    """One implementation of an op.

    Attributes:
        name: in the results.
        build: of a case and its inputs, a call without arguments. What it prepares is not timed.
        unavailable: of the same, why nothing can be built here, or None.
        version: of what is measured; asked only where it is available.
        set_threads: sets the threads of its library, and returns how many the library then uses.
        ours: not a peer.
        limit: an instruction set that it is held to; speed-ups are over peers of the same limit.
    """

    name: str
    build: Callable[[C, Inputs], Call]
    unavailable: Unavailable[C] = always
    version: Callable[[], str] = _torch_version
    set_threads: Callable[[int], int] = torch_threads
    ours: bool = False
    limit: str = ""


@dataclass(frozen=True)
class ScoreLoop(Generic[C]):
    """The first product loop of a kernel, which makes scores.

    Attributes:
        scores: of a case.
        per_turn: those that a program makes in one turn, for a case on a target.
        tensor_flops: that its products do for a case, padding included.
        exponentials: of a score.
    """

    scores: Callable[[C], int]
    per_turn: Callable[[C, str], int]
    tensor_flops: Callable[[C], int]
    exponentials: int = 0


@dataclass(frozen=True)
class AuditPlan(Generic[C]):
    """How to take an op's Triton kernels apart where there is no GPU.

    Attributes:
        cases: to compile for.
        launch: runs the Triton backend on a case with tensors of the CPU, as if they lay on a GPU.
        loops: by the names of the kernels that make scores.
    """

    cases: Sequence[C]
    launch: Callable[[C], object]
    loops: Mapping[str, ScoreLoop[C]] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark(Generic[C]):
    """Of one op.

    Attributes:
        op: its name.
        providers: in the order of their turns.
        cases: for the record.
        quick: tiny ones, which show that everything runs.
        audit: of its Triton kernels, if it has any.
        repeats: timed calls of each provider, unless another number is asked for.
        summary: of the rows of a run, what to print at its end.
    """

    op: str
    providers: Sequence[Provider[C]]
    cases: Sequence[C]
    quick: Sequence[C]
    audit: AuditPlan[C] | None = None
    repeats: int = 15
    summary: Callable[[Sequence[Mapping[str, str]]], str] | None = None

    def select(self, names: Sequence[str]) -> list[Provider[C]]:
        """Providers of those names; all if none is given.

        Raises:
            ValueError: there is no such provider.
        """
        known = [provider.name for provider in self.providers]
        for name in names:
            if name not in known:
                raise ValueError(f"providers: expected some of {', '.join(known)}, found {name!r}")
        return [provider for provider in self.providers if not names or provider.name in names]

    def run(
        self,
        *,
        threads: int,
        device: torch.device,
        repeats: int | None = None,
        quick: bool = False,
        providers: Sequence[str] = (),
    ) -> Iterator[list[Record]]:
        """Measure; the records of one case after the other, one for each provider.

        Args:
            threads: of every library.
            device: to run on.
            repeats: timed calls of each provider; the benchmark's own number if None.
            quick: take the tiny cases.
            providers: names; all if empty.

        Raises:
            MachineError: `OMP_NUM_THREADS` or a library disagrees with `threads`.
            ValueError: there is no such provider.
        """
        chosen = self.select(providers)
        _machine.require_threads(threads)
        torch_threads(threads)
        found = _machine.conditions(device, threads)
        rate = _machine.gemm_rate(device, _QUICK_GEMM_SIZE if quick else _GEMM_SIZE[device.type])
        for case in self.quick if quick else self.cases:
            yield _measure(self.op, case, chosen, device, repeats or self.repeats, rate, found)


def missing_package(name: str) -> str | None:
    """ "not installed", or None where the module can be imported."""
    return None if importlib.util.find_spec(name) else f"{name} is not installed"


def interleave(calls: Mapping[str, Call], repeats: int, clock: Timer) -> dict[str, list[float]]:
    """Milliseconds of `repeats` calls of each, taken in turns: A, B, A, B, ...

    A turn is two calls, and only the second counts: the first takes caches and cores back from the provider
    before, for the idle threads of a library's pool go on spinning for a while. Calls of more than two
    seconds have their own warm-up in them: after the first turn they are called once a turn.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    slow: set[str] = set()
    for turn in range(-_WARM_UP, repeats):
        for name, call in calls.items():
            if name in slow and turn < 0:
                continue
            if name not in slow:
                call()
            milliseconds = clock(call)
            if milliseconds > _SLOW_MS:
                slow.add(name)
            if turn >= 0:
                times[name].append(milliseconds)
    return times


def summarize(times: Sequence[float]) -> Times:
    """Median, least, and quantiles of one provider's times."""
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else [times[0]] * 4
    return Times(statistics.median(times), min(times), fifths[0], fifths[3], len(times))


@dataclass(frozen=True)
class Trial(Generic[C]):
    """A case on a device, with what its providers are verified by."""

    case: C
    left_out: str | None
    inputs: Inputs = ()
    expected: Any = None

    @classmethod
    def of(cls, case: C, device: torch.device) -> Trial[C]:
        """Inputs and the reference's result are made, unless the case is left out on that device."""
        left_out = case.unavailable(device)
        if left_out is not None:
            return cls(case, left_out)
        inputs = case.inputs(device)
        return cls(case, None, inputs, case.expected(*inputs))

    def reason(self, provider: Provider[C]) -> str | None:
        """Why a provider cannot run here, or None."""
        return self.left_out or provider.unavailable(self.case, self.inputs)

    def build(self, provider: Provider[C], threads: int) -> tuple[Call, int]:
        """Of a provider that can run, its call, and how many rows of the result are wrong.

        Raises:
            MachineError: its library takes another number of threads.
        """
        used = provider.set_threads(threads)
        if used != threads:
            raise MachineError(f"{provider.name}: expected {threads} threads, found that it uses {used}")
        call = provider.build(self.case, self.inputs)
        return call, self.case.wrong_rows(call(), self.expected)


def _measure(
    op: str,
    case: C,
    providers: Sequence[Provider[C]],
    device: torch.device,
    repeats: int,
    gemm_rate: float,
    found: Conditions,
) -> list[Record]:
    trial = Trial.of(case, device)
    reasons = {provider.name: trial.reason(provider) for provider in providers}
    calls: dict[str, Call] = {}
    wrong: dict[str, int] = {}
    memory: dict[str, int | None] = {}
    canary = _machine.canary(device)
    for provider in providers:
        name = provider.name
        if reasons[name] is None:
            calls[name], wrong[name] = trial.build(provider, found.threads)
            memory[name] = _machine.peak_extra_bytes(calls[name], device)
            calls[f"{name} {_CANARY}"] = canary
    taken = interleave(calls, repeats, _machine.timer(device))
    times = {name: summarize(own) for name, own in taken.items() if name in wrong}
    canaries = {name: taken[f"{name} {_CANARY}"] for name in wrong}
    undisturbed = min((min(own) for own in canaries.values()), default=0.0)

    floor_ms = case.flops / gemm_rate * 1e3
    figures = case.figures(device, found.threads, bool(times))
    records = []
    for provider in providers:
        own = times.get(provider.name)
        peers = [
            peer.name
            for peer in providers
            if not peer.ours and peer.limit == provider.limit and peer.name in times
        ]
        best = min(peers, key=lambda name: times[name].median_ms, default=None)
        extra = memory.get(provider.name)
        wrong_rows = wrong.get(provider.name)
        records.append(
            Record(
                op=op,
                case=asdict(case),  # type: ignore[call-overload]
                provider=provider.name,
                role="ours" if provider.ours else "peer",
                version=provider.version() if own else "",
                times=own,
                wrong_rows=wrong_rows,
                best_peer=best if own and best else "",
                speedup=times[best].median_ms / own.median_ms if own and best else None,
                per_second=case.items / own.median_ms * 1e3 if own else None,
                gemm_gflops=gemm_rate / 1e9,
                times_floor=own.median_ms / floor_ms if own and floor_ms else None,
                peak_extra_mib=extra / 2**20 if extra is not None else None,
                contention=statistics.fmean(canaries[provider.name]) / undisturbed if own else None,
                reason=reasons[provider.name] or (f"wrong on {wrong_rows} rows" if wrong_rows else ""),
                conditions=found,
                figures=figures,
            )
        )
    return records
