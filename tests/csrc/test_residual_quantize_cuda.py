"""The CUDA kernel's own code on the CPU: against the reference, and under sanitizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hitsr_fast.reference.residual_quantize as reference
from benchmarks.shapes import MODELS
from hitsr_fast.reference.nearest_code import nearest_code
from hitsr_fast.reference.residual_quantize import phi_table
from tests.csrc.host_kernel import (
    MEMORY,
    NEEDS_COMPILER,
    QUICK,
    RACED,
    REPORTED,
    SHARED,
    THREADS,
    Problem,
    Result,
    barriers,
    break_copy,
    build,
    execute,
    read,
    run,
)
from tests.tolerances import TOLERANCES

HIT = tuple((side, side) for side in MODELS["hit-d16"].scales)

pytestmark = NEEDS_COMPILER


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("quick"), *QUICK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the files of one run after another."""
    return tmp_path_factory.mktemp("runs")


def problem(
    C: int = 16,
    size: tuple[int, int] = (6, 5),
    scales: Sequence[tuple[int, int]] = ((1, 1), (3, 2), (6, 5)),
    K: int = 150,
    batch: int = 1,
    **settings: object,
) -> Problem:
    codebook, z = torch.randn(K, C) * 0.5, torch.randn(batch, C, *size)
    phi = torch.randn(4, C, C, 3, 3) / (3 * C**0.5), torch.randn(4, C) * 0.1
    return Problem(z, codebook, *phi, scales, phi_table(len(scales)), size, batch, **settings)  # type: ignore[arg-type]


def check(given: Problem, found: Result) -> None:
    """Tokens against the definition on the rows that were searched; those and all else in float64."""
    flat = [side for scale in given.scales for side in scale]
    replayed = 0 if given.replay is None else given.replay.shape[1]
    if given.replay is not None:
        assert torch.equal(found.indices[:, :replayed], given.replay)
    rows = found.rows[:, replayed:].flatten(0, 1)
    nearest = nearest_code(rows, given.codebook, "l2").view(given.batch, -1)
    assert torch.equal(found.indices[:, replayed:], nearest)

    bank = (given.codebook.double(), given.phi_weight.double(), given.phi_bias.double())
    expected, inputs, reconstructions = reference.residual_decode(
        found.indices, *bank, flat, given.phi_index, given.size, given.phi_ratio, True, True
    )
    close = TOLERANCES["float32_reordered"]._asdict()
    torch.testing.assert_close(found.reconstruction.double(), expected, **close)
    if given.inputs:
        torch.testing.assert_close(found.inputs.double(), inputs, **close)
    if given.per_scale:
        torch.testing.assert_close(found.reconstructions.double(), reconstructions, **close)
        assert torch.equal(found.reconstructions[-1], found.reconstruction)
    if given.z is None:
        return
    ends = [0, *accumulate(h * w for h, w in given.scales)]
    for s, scale in enumerate(given.scales):
        residual = given.z.double() - (reconstructions[s - 1] if s else 0)
        pooled = torch.nn.functional.adaptive_avg_pool2d(residual, scale).flatten(2).transpose(1, 2)
        if ends[s] >= replayed:
            torch.testing.assert_close(found.rows[:, ends[s] : ends[s + 1]].double(), pooled, **close)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any map and scales, or even ones that a cluster of two can share; any launch that the kernel allows."""
    even = draw(st.booleans())
    heights = st.integers(1, 4).map(lambda half: 2 * half) if even else st.integers(1, 9)
    H, W = draw(heights), draw(st.sampled_from([1, 3, 8, 16, 17, 20]))
    inside = heights.filter(lambda h: h <= H)
    sides = st.one_of(st.just((H, W)), st.tuples(inside, st.integers(1, W)))
    scales = draw(st.lists(sides, min_size=1, max_size=3))
    batch = draw(st.integers(1, 2))
    made = problem(
        draw(st.sampled_from([8, 16, 32, 64])),
        (H, W),
        scales,
        draw(st.sampled_from([1, 31, 129, 300])),
        batch,
        phi_ratio=draw(st.sampled_from([0.0, 0.5, 1.0])),
        inputs=draw(st.booleans()),
        per_scale=draw(st.booleans()),
        threads=32 * draw(st.sampled_from([1, 2, 3, 8])),
        max_ranks=draw(st.sampled_from([1, 2])),
        strip=draw(st.sampled_from([0, 1, 2])),
        limit=SHARED["sm_90"],
    )
    count = draw(st.integers(0, len(scales)))
    if count:
        tokens = sum(h * w for h, w in scales[:count])
        made = replace(made, replay=torch.randint(0, made.codebook.shape[0], (batch, tokens)))
    return made


@given(drawn=problems())
def test_equals_the_reference(program: Path, folder: Path, drawn: Problem) -> None:
    check(drawn, run(program, drawn, folder))


@pytest.mark.parametrize(("chip", "ranks", "shared"), [("sm_80", 1, 166656), ("sm_90", 2, 103168)])
def test_the_shape_that_it_is_made_for(
    program: Path, tmp_path: Path, chip: str, ranks: int, shared: int
) -> None:
    made = problem(32, (32, 32), HIT, 4096, inputs=True, per_scale=True, max_ranks=ranks, limit=SHARED[chip])
    found = run(program, made, tmp_path)
    assert (found.ranks, found.shared) == (ranks, shared)
    assert found.full_scans.float().mean() < 1e-3
    check(made, found)


def test_blocks_of_a_cluster_give_the_bits_of_one(program: Path, tmp_path: Path) -> None:
    made = problem(16, (12, 12), ((2, 3), (6, 6), (12, 12)), inputs=True, max_ranks=2, limit=SHARED["sm_90"])
    two, one = run(program, made, tmp_path), run(program, replace(made, max_ranks=1, threads=64), tmp_path)
    assert (two.ranks, one.ranks) == (2, 1)
    assert torch.equal(two.indices, one.indices)
    assert torch.equal(two.reconstruction, one.reconstruction)
    assert torch.equal(two.inputs, one.inputs)


def test_decode_gives_the_bits_of_the_reconstruction(program: Path, tmp_path: Path) -> None:
    made = problem(8, (9, 20), ((2, 3), (9, 20)), batch=2, inputs=True, per_scale=True, threads=64)
    found = run(program, made, tmp_path)
    decoded = run(program, replace(made, z=None, replay=found.indices), tmp_path)
    for name in ("indices", "reconstruction", "inputs", "reconstructions"):
        assert torch.equal(getattr(decoded, name), getattr(found, name)), name


def test_images_of_a_batch_are_independent(program: Path, tmp_path: Path) -> None:
    made = problem(batch=3)
    assert made.z is not None
    made.z[1] = torch.nan
    found = run(program, made, tmp_path)
    for image in (0, 2):
        alone = run(program, replace(made, z=made.z[image : image + 1], batch=1), tmp_path)
        assert torch.equal(found.indices[image], alone.indices[0])
        assert torch.equal(found.reconstruction[image], alone.reconstruction[0])
    assert found.indices[1].eq(0).all()


def offset(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return x + 30, codes + 30


def far_rows(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return x + 30, codes


def short_codes(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return x, codes * 1e-4


def ties(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return x.round(), codes.mul(2).round()


def one_code_many_times(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return x, codes[:1].expand_as(codes).contiguous()


def zeros(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return x * 0, codes * 0


def huge_and_tiny(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return x * 10.0 ** torch.arange(-42, 38, 2).view(1, 1, 5, 8), codes * 1e18


def not_finite(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    x[0, 3, 1, 1], x[0, 2, 2, 2], x[0, 5, 3, 3] = torch.nan, torch.inf, -torch.inf
    return x, codes


HARD = [offset, far_rows, short_codes, ties, one_code_many_times, zeros, huge_and_tiny, not_finite]


@pytest.mark.parametrize("C", [8, 32])
@pytest.mark.parametrize("make", HARD, ids=lambda make: make.__name__)
def test_the_search_is_exact_on_hard_rows(
    program: Path, tmp_path: Path, make: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], C: int
) -> None:
    """One scale of the size of the map: the latent's places are the rows."""
    made = problem(C, (5, 8), ((5, 8),), 500, phi_ratio=0.0, threads=64)
    assert made.z is not None
    z, codebook = make(made.z, made.codebook)
    found = run(program, replace(made, z=z, codebook=codebook), tmp_path)
    rows = z.flatten(2).transpose(1, 2)
    assert torch.equal(found.rows.nan_to_num(7.0), rows.nan_to_num(7.0))
    assert torch.equal(found.indices[0], nearest_code(rows[0], codebook, "l2"))
    if make in (one_code_many_times, zeros):  # no screen can tell such codes apart
        assert found.full_scans.all()


def test_what_does_not_fit_is_not_run(program: Path, tmp_path: Path) -> None:
    wide = problem(64, (32, 32), ((32, 32),), 10)
    assert run(program, replace(wide, max_ranks=2), tmp_path).ranks == 0
    check(wide, run(program, replace(wide, max_ranks=2, limit=SHARED["sm_90"]), tmp_path))
    odd = problem(16, (8, 8), ((1, 1), (8, 8)), max_ranks=2, limit=SHARED["sm_90"])
    assert run(program, odd, tmp_path).ranks == 1


def sanitized() -> list[Problem]:
    """Two blocks and one, several passes of several warps, tails everywhere, all outputs, a replay."""
    both = {"inputs": True, "per_scale": True, "threads": 64, "limit": SHARED["sm_90"]}
    shared = problem(16, (12, 12), ((2, 2), (6, 6), (12, 12)), 300, max_ranks=2, **both)
    odd = problem(8, (9, 10), ((1, 2), (5, 4), (9, 10)), 300, batch=2, **both)
    replayed = replace(odd, replay=torch.randint(0, 300, (2, 2)), phi_ratio=0.0)
    return [shared, replace(shared, max_ranks=1), odd, replayed]


def test_memory_and_arithmetic_are_clean(tmp_path: Path) -> None:
    program = build(tmp_path, *MEMORY)
    for made in [*sanitized(), problem(64, (6, 17), ((3, 3), (6, 17)), 129, threads=32)]:
        check(made, run(program, made, tmp_path))


def test_threads_do_not_race(tmp_path: Path) -> None:
    """A thread of the system for each of the GPU's, watched by a sanitizer that sees what is not ordered."""
    program = build(tmp_path, *THREADS)
    for made in sanitized():
        found = run(program, made, tmp_path)
        check(made, found)
        assert not found.full_scans.any()


def test_a_removed_barrier_is_found(tmp_path: Path) -> None:
    path, number = next(found for found in barriers("residual_quantize") if found[0].name == "spread.h")
    break_copy(tmp_path, path, number)
    done = execute(build(tmp_path, *THREADS, root=tmp_path), sanitized()[0], tmp_path)
    assert done.returncode == REPORTED
    assert RACED in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "number"), list(barriers("residual_quantize")), ids=lambda value: getattr(value, "stem", value)
)
def test_every_removed_barrier_is_found(tmp_path: Path, path: Path, number: int) -> None:
    """By a race or what comes of it; or, where nobody waits for copies, by rows that no screen decides.

    Nothing else can fail: the same problems pass with all barriers in place.
    """
    break_copy(tmp_path, path, number)
    program = build(tmp_path, *THREADS, root=tmp_path)
    assert any(
        execute(program, made, tmp_path).returncode != 0 or read(made, tmp_path / "result").full_scans.any()
        for made in sanitized()
    )
