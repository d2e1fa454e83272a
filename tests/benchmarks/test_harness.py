"""The harness on toy providers: the wrong are flagged, the missing have a reason, and turns alternate."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import _machine, _records
from benchmarks._harness import Benchmark, Case, Provider, interleave, summarize
from benchmarks._machine import MachineError

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Doubling(Case):
    """Twice each of N numbers."""

    N: int

    @property
    def flops(self) -> int:
        return self.N

    @property
    def items(self) -> int:
        return 2 * self.N

    def unavailable(self, device: torch.device) -> str | None:
        return "too many" if self.N > 100 else None

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        return (torch.arange(self.N, device=device),)

    def expected(self, *inputs: Tensor) -> Tensor:
        return 2 * inputs[0]

    def wrong_rows(self, result: Tensor, expected: Tensor) -> int:
        return int((result != expected).sum())


def provider(
    name: str, run: Callable[[Tensor], Tensor] = lambda x: x + x, reason: str | None = None, **options: Any
) -> Provider[Doubling]:
    def build(case: Doubling, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
        assert reason is None, "a provider that is unavailable must not be built"
        return lambda: run(*inputs)

    return Provider(
        name=name,
        build=build,
        unavailable=lambda case, inputs: reason,
        version=lambda: f"{name} 1.0",
        **options,
    )


def run(*providers: Provider[Doubling], names: tuple[str, ...] = (), N: int = 8) -> list[_records.Record]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(threads))
        benchmark = Benchmark(op="doubling", providers=providers, cases=(), quick=(Doubling(N),))
        (records,) = benchmark.run(threads=threads, device=CPU, repeats=3, quick=True, providers=names)
    return records


def test_a_right_provider_has_all_figures() -> None:
    (record,) = run(provider("right", ours=True))
    row = record.row()
    assert row["op"] == "doubling"
    assert row["N"] == "8"
    assert row["version"] == "right 1.0"
    assert row["wrong_rows"] == "0"
    assert row["repeats"] == "3"
    assert float(row["min_ms"]) <= float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
    floor_ms = 8 / (float(row["gemm_gflops"]) * 1e9) * 1e3
    assert float(row["times_floor"]) == pytest.approx(float(row["median_ms"]) / floor_ms, rel=1e-4)
    assert float(row["per_second"]) == pytest.approx(16 / float(row["median_ms"]) * 1e3, rel=1e-4)
    # Nobody to compare with.
    assert (row["best_peer"], row["speedup"], row["reason"]) == ("", "", "")


def test_a_wrong_provider_is_flagged_and_keeps_its_timing() -> None:
    (record,) = run(provider("wrong", lambda x: 2 * x + (x > 5)))
    assert record.wrong_rows == 2
    assert record.reason == "wrong on 2 rows"
    assert record.times is not None


def test_a_missing_provider_is_a_row_with_its_reason() -> None:
    missing, _ = run(provider("missing", reason="not installed"), provider("right"))
    assert missing.reason == "not installed"
    row = missing.row()
    figures = ("median_ms", "min_ms", "wrong_rows", "speedup", "peak_extra_mib", "contention")
    assert all(row[name] == "" for name in ("version", *figures))


def test_a_case_that_is_left_out_is_a_row_with_its_reason() -> None:
    record, missing = run(provider("right"), provider("missing", reason="not installed"), N=101)
    assert record.reason == missing.reason == "too many"
    row = record.row()
    assert (row["N"], row["median_ms"], row["per_second"], row["wrong_rows"]) == ("101", "", "", "")


def test_speedups_are_over_the_best_peer_of_the_same_limit() -> None:
    def slow(x: Tensor) -> Tensor:
        for _ in range(300):
            x.clone()
        return x + x

    records = {
        record.provider: record
        for record in run(
            provider("slow peer", slow),
            provider("peer"),
            provider("limited peer", slow, limit="avx2"),
            provider("mine", ours=True),
            provider("mine limited", ours=True, limit="avx2"),
            provider("missing", reason="not installed"),
        )
    }
    assert records["mine"].best_peer == records["slow peer"].best_peer == "peer"
    assert records["mine limited"].best_peer == "limited peer"
    times, peers = records["mine"].times, records["peer"].times
    assert times is not None and peers is not None
    assert records["mine"].speedup == peers.median_ms / times.median_ms
    assert records["peer"].speedup == 1
    assert records["missing"].best_peer == ""


def test_a_canary_tells_beside_whom_the_machine_was_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    last: list[str] = []

    def disturbed(x: Tensor) -> Tensor:
        last[:] = ["disturbed"]
        return x + x

    def quiet(x: Tensor) -> Tensor:
        last[:] = ["quiet"]
        return x + x

    def canary() -> None: ...

    def clock(call: Callable[[], Any]) -> float:
        call()
        return 3.0 if call is canary and last == ["disturbed"] else 2.0

    monkeypatch.setattr(_machine, "canary", lambda device: canary)
    monkeypatch.setattr(_machine, "timer", lambda device: clock)
    missing, *records = run(
        provider("missing", reason="not installed"),
        provider("quiet", quiet),
        provider("disturbed", disturbed),
    )
    assert [record.contention for record in records] == [1.0, 1.5]
    assert missing.row()["contention"] == ""
    assert all(record.times is not None and record.times.median_ms == 2.0 for record in records)


def test_turns_alternate_and_only_every_second_call_is_timed() -> None:
    log: list[str] = []
    calls = {name: lambda name=name: log.append(name) for name in "AB"}

    def clock(call: Callable[[], Any]) -> float:
        log.append("timed")
        call()
        return float(len(log))

    times = interleave(calls, 3, clock)
    turn = ["A", "timed", "A", "B", "timed", "B"]
    assert len(log) % len(turn) == 0 and len(log) > 3 * len(turn)  # there is a warm-up
    assert log == turn * (len(log) // len(turn))
    assert {name: len(taken) for name, taken in times.items()} == {"A": 3, "B": 3}
    assert times["B"][-1] == len(log)


def test_summary() -> None:
    assert summarize([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == _records.Times(3.5, 1.0, 2.0, 5.0, 6)
    assert summarize([7.0]) == _records.Times(7.0, 7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize("found", ["3", None])
def test_another_number_of_threads_is_refused(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if found:
        monkeypatch.setenv("OMP_NUM_THREADS", found)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    benchmark = Benchmark(op="doubling", providers=(provider("right"),), cases=(), quick=(Doubling(8),))
    message = f"OMP_NUM_THREADS: expected 5, as many threads as asked for, found {found or 'nothing'}"
    with pytest.raises(MachineError, match=message):
        next(benchmark.run(threads=5, device=CPU, quick=True))


def test_a_library_that_takes_other_threads_is_refused() -> None:
    with pytest.raises(MachineError, match=r"greedy: expected [0-9]+ threads, found that it uses 64"):
        run(provider("greedy", set_threads=lambda threads: 64))


def test_providers_can_be_chosen() -> None:
    records = run(provider("one"), provider("two"), provider("three"), names=("three", "one"))
    assert [record.provider for record in records] == ["one", "three"]
    with pytest.raises(ValueError, match="providers: expected some of one, two, found 'four'"):
        run(provider("one"), provider("two"), names=("four",))


def test_rows_are_replaced_by_op_case_provider_and_device(tmp_path: Path) -> None:
    path = tmp_path / "results" / "doubling.csv"
    one, two = run(provider("one"), provider("two", reason="not installed"))
    _records.save(path, [one, two])
    elsewhere = dataclasses.replace(two, conditions=dataclasses.replace(two.conditions, device="a GPU"))
    larger = dataclasses.replace(two, case={"N": 9})
    _records.save(path, [dataclasses.replace(two, reason="no licence"), elsewhere, larger])
    rows = [(row["N"], row["provider"], row["device"], row["reason"]) for row in _records.read(path)]
    assert rows == [
        ("8", "one", "cpu", ""),
        ("8", "two", "cpu", "no licence"),
        ("8", "two", "a GPU", "not installed"),
        ("9", "two", "cpu", "not installed"),
    ]
    assert [child.name for child in path.parent.iterdir()] == ["doubling.csv"]


def test_peak_memory_sees_native_allocations() -> None:
    mebibyte = 2**20

    def hold() -> None:
        kept = torch.ones(64 * mebibyte // 4)
        torch.ones(32 * mebibyte // 4)
        del kept

    for _ in range(2):  # the second finds what the first has freed
        found = _machine.peak_extra_bytes(hold, CPU)
        if found is None:
            assert not os.access("/proc/self/clear_refs", os.W_OK)  # nothing to measure with
            return
        assert 90 * mebibyte < found < 110 * mebibyte


def test_conditions_are_recorded() -> None:
    found = _machine.conditions(CPU, 2)
    assert found.device == "cpu"
    assert found.cpu_model
    assert found.torch == torch.__version__
    assert found.threads == 2
