"""The audit of Triton kernels: what it predicts follows from what it counts."""

from __future__ import annotations

import pytest

from benchmarks import __main__ as cli
from benchmarks._audit import CHIPS, audit, occupancy
from benchmarks.ops import bench_scale_block_attention as attention
from benchmarks.ops.bench_nearest_code import BENCHMARK
from tests.kernels.aot import TARGETS


def test_every_target_has_a_chip() -> None:
    assert set(CHIPS) == set(TARGETS)


@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "warp", "expected"),
    [
        ("sm_90", 32, 0, 128, 32, 1.0),
        ("sm_90", 128, 1024, 128, 32, 16 / 64),  # registers: four warps on each of four schedulers
        ("sm_90", 129, 1024, 128, 32, 12 / 64),  # which come in eights
        ("sm_90", 32, 113 * 1024, 128, 32, 8 / 64),  # shared memory: two programs
        ("sm_89", 32, 0, 1024, 32, 32 / 48),  # warps: one program
        ("sm_80", 255, 0, 512, 32, 0.0),  # none fits
        ("gfx942", 128, 0, 256, 64, 16 / 32),
        ("gfx942", 64, 64 * 1024, 256, 64, 4 / 32),
    ],
)
def test_occupancy(
    target: str, registers: int, shared: int, threads: int, warp: int, expected: float
) -> None:
    found = occupancy(CHIPS[target], registers=registers, shared=shared, threads=threads, warp=warp)
    assert found == expected


def test_an_amd_target() -> None:
    plan = BENCHMARK.audit
    assert plan is not None
    for finding in audit(plan, plan.cases[1], ["gfx942"]):
        assert finding.registers > 0
        assert 0 < finding.occupancy <= 1


def test_an_audit_counts_and_predicts() -> None:
    plan = BENCHMARK.audit
    assert plan is not None
    case = plan.cases[0]
    found = {finding.kernel: finding for finding in audit(plan, case, ["sm_90"])}
    assert {"_nearest_code_screen_kernel", "_nearest_code_recheck_kernel"} < set(found)
    screen, recheck = found["_nearest_code_screen_kernel"], found["_nearest_code_recheck_kernel"]
    assert (recheck.per_score, recheck.floor_ms) == (None, None)
    assert screen.per_score is not None and screen.floor_ms is not None
    # At least a fused multiply-add and a minimum, and less than a product on ordinary cores would take.
    assert 2 < screen.per_score < case.C
    chip = CHIPS["sm_90"]
    assert screen.floor_ms >= case.flops / (chip.teraflops * 1e12) * 1e3
    issued = case.N * case.K * screen.per_score / (chip.units * chip.lanes * chip.gigahertz * 1e9) * 1e3
    assert screen.floor_ms == pytest.approx(issued)


def test_an_unknown_target_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["audit", "nearest_code", "--targets", "sm_9"])
    assert end.value.code == 2
    assert f"--targets: expected some of {', '.join(TARGETS)}, found 'sm_9'" in capsys.readouterr().err


def test_the_table_marks_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["audit", "nearest_code", "--targets", "sm_80"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert (
        out.count("compiled, not run")
        == out.count("occupancy (predicted)")
        == out.count("floor ms (predicted)")
        == 2
    )
    assert out.count("_nearest_code_screen_kernel") == 2


def test_each_kernel_of_attention_has_its_scores() -> None:
    plan = attention.BENCHMARK.audit
    assert plan is not None
    case = attention.AttentionCase("train", "bfloat16", NH=2, model="toy")
    found = {finding.kernel: finding for finding in audit(plan, case, ["sm_90"])}
    chip = CHIPS["sm_90"]
    exponentials = case.scores / (chip.units * chip.gigahertz * 1e9 * 16) * 1e3
    for name, loop in plan.loops.items():
        finding = found[name]
        assert finding.per_score is not None and finding.floor_ms is not None
        products = loop.tensor_flops(case) / (chip.teraflops * 1e12) * 1e3
        issued = case.scores * finding.per_score / (chip.units * chip.lanes * chip.gigahertz * 1e9) * 1e3
        assert finding.floor_ms == pytest.approx(max(products, exponentials, issued))
    assert found["_scale_block_attention_delta_kernel"].per_score is None
    # Two products forward, four and three backward.
    assert sum(loop.tensor_flops(case) for loop in plan.loops.values()) == case.scores * 2 * case.D * 9
