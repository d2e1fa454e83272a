"""`nearest_code` against float64 brute force, on ordinary and on adversarial inputs, on every backend."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import nearest_code, nearest_code_triton, prepare_codebook, use_instruction_set
from hitsr_fast.ops.nearest_code_triton import as_maps
from hitsr_fast.ops.packed_codebook import LAYOUT, pack_triton
from hitsr_fast.reference.nearest_code import nearest_code as reference
from hitsr_fast.reference.nearest_code import root
from tests.ops.backends import SHIPPED, placed, refusal, sizes

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OP = torch.ops.hitsr_fast.nearest_code.default
# Rows, codes, channels.
SIZES = {
    "any": [(300, 700, 5), (97, 257, 32), (50, 1030, 33), (130, 16, 1), (20, 300, 256)],
    "interpreted": [(37, 150, 5), (20, 257, 33), (140, 16, 1)],
    "gpu": [(100_000, 4096, 32), (1000, 1030, 33), (300, 16384, 64), (50, 300, 256)],
}


def brute_force(x: Tensor, codebook: Tensor) -> Tensor:
    """argmin of exact squared distances, in rational arithmetic."""
    indices = []
    for row in x.tolist():
        distances = [
            sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(row, code, strict=True))
            for code in codebook.tolist()
        ]
        indices.append(distances.index(min(distances)))
    return torch.tensor(indices, dtype=torch.int64)


@st.composite
def few_values(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES[:3]) -> tuple[Tensor, Tensor]:
    """Rows and codes of a few whole numbers, at several scales: ties and duplicate codes are likely."""
    rows, codes, channels = draw(st.integers(0, 20)), draw(st.integers(1, 12)), draw(st.integers(1, 9))
    dtype, levels = draw(st.sampled_from(dtypes)), draw(st.sampled_from([1, 2, 5, 1000]))
    # float16 has no room for the large scales.
    scale = 1.0 if dtype == torch.float16 else draw(st.sampled_from([1.0, 2.0**-60, 2.0**60]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randint(-levels, levels + 1, (rows, channels), generator=generator)
    codebook = torch.randint(-levels, levels + 1, (codes, channels), generator=generator)
    return x.to(dtype) * scale, codebook.to(dtype) * scale


def check(x: Tensor, codebook: Tensor, metric: str = "l2") -> None:
    """Equal to the definition."""
    found = nearest_code(x, codebook, metric=metric)  # type: ignore[arg-type]
    assert torch.equal(found, reference(x, codebook, metric))


def check_exactly(x: Tensor, codebook: Tensor) -> None:
    """Equal to rational arithmetic."""
    assert nearest_code(x, codebook).tolist() == brute_force(x, codebook).tolist()


@given(problem=few_values())
def test_equals_exact_arithmetic(backend: str, problem: tuple[Tensor, Tensor]) -> None:
    check_exactly(*placed(*problem))


@pytest.mark.backends("reference")
@given(problem=few_values(DTYPES[3:]))
def test_equals_exact_arithmetic_in_float64(backend: str, problem: tuple[Tensor, Tensor]) -> None:
    check_exactly(*problem)


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_equals_exact_arithmetic_far_from_the_origin(backend: str, offset: float) -> None:
    x, codebook = torch.randn(40, 6) + offset, torch.randn(30, 6) + offset
    check_exactly(x, codebook)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_values(backend: str, size: float) -> None:
    x, codebook = torch.randn(40, 6) * size, torch.randn(30, 6) * size
    check_exactly(x, codebook)


KINDS = (
    "random",
    "clustered",
    "duplicates",
    "equal",
    "offset",
    "far offset",
    "tiny",
    "huge",
    "near ties",
    "hits",
)


def problem(kind: str, rows: int, codes: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows and codes that are hard in one way or another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator)
    codebook = torch.randn(codes, channels, generator=generator)
    pick = torch.randint(codes, (rows,), generator=generator)
    if kind == "clustered":
        x = codebook[pick] + 0.05 * x
    elif kind == "duplicates":
        codebook = codebook[torch.randint(max(codes // 20, 1), (codes,), generator=generator)]
    elif kind == "equal":
        codebook = codebook[:1].expand(codes, channels).clone()
    elif kind == "offset":
        x, codebook = x + 10, codebook + 10
    elif kind == "far offset":
        x, codebook = x + 1000, codebook + 1000
    elif kind == "tiny":
        x, codebook = x * 1e-30, codebook * 1e-30
    elif kind == "huge":
        x, codebook = x * 1e30, codebook * 1e30
    elif kind == "near ties":  # codes one unit in the last place apart, rows between them
        codebook[1::2] = codebook[: 2 * (codes // 2) : 2].nextafter(torch.tensor(torch.inf))
        x = codebook[pick] + 1e-3 * x
    elif kind == "hits":
        x = codebook[pick]
    return x, codebook


@pytest.mark.backends("cpu", "triton")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_equals_the_definition(backend: str, kind: str, metric: str) -> None:
    for size in sizes(backend, SIZES):
        x, codebook = placed(*problem(kind, *size))
        for dtype in DTYPES[:3]:
            a, b = x.to(dtype), codebook.to(dtype)
            if a.isfinite().all() and b.isfinite().all():  # float16 has no 1e30
                check(a, b, metric)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("channels", [*range(1, 41, 3), 100, 256])
def test_channels(backend: str, channels: int) -> None:
    check(*placed(*problem("clustered", 9, 140, channels)))


@pytest.mark.backends("cpu")
def test_a_hundred_thousand_rows_equal_the_definition(backend: str) -> None:
    rows = 100_000 // len(KINDS)
    for seed, kind in enumerate(KINDS):
        check(*problem(kind, rows, 512, 8, seed))


@pytest.mark.slow
@pytest.mark.backends("cpu")
@pytest.mark.parametrize("kind", KINDS)
def test_a_million_rows_equal_the_definition(backend: str, kind: str) -> None:
    for seed in range(10):
        check(*problem(kind, 20_000, 4096, 32, seed))


def test_values_at_the_ends_of_the_range(backend: str) -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[largest, -largest], [1e-45, 0.0], [largest, largest], [-0.0, 1.0], [1.0, torch.nan]])
    codebook = torch.tensor(
        [[-largest, largest], [0.0, 0.0], [largest, -largest], [1e-45, 1e-45], [1.0, 1.0]]
    )
    for codes in (codebook, codebook[1:2], codebook[3:4] * torch.arange(1, 40)[:, None], codebook[1:]):
        check(x, codes, "l2")
        check(x, codes, "cosine")


def test_differences_beyond_float32(backend: str) -> None:
    """3.5e38 apart in one channel is nearer than 2.8e38 in two."""
    x = torch.tensor([[3e38, 0.0]])
    codebook = torch.tensor([[2e37, 2.8e38], [-5e37, 0.0]])
    assert nearest_code(x, codebook).tolist() == [1]


def test_padding_is_no_candidate(backend: str) -> None:
    # Zero is nearer than either code, and float32 cannot tell the two apart.
    x = torch.tensor([[0.7, 0.9]])
    codebook = torch.tensor(
        [[1.704636812210083, 1.439172387123108], [1.8396443128585815, 0.8651784062385559]]
    )
    check_exactly(x, codebook)


def test_differences_beyond_the_range_of_float32(backend: str) -> None:
    largest = torch.finfo(torch.float32).max
    codebook = torch.tensor([[-0.45, 0.0], [-0.38, 0.5], *[[0.0, -0.99]] * 14]) * largest
    x = torch.tensor([[0.6, 0.0]]) * largest
    check_exactly(x, codebook)


def test_roots_are_those_of_ieee_754() -> None:
    """One unit in the last place of a length decides between codes of one direction."""
    values = torch.rand(2000, dtype=torch.float64)
    assert root(values).tolist() == [math.sqrt(value) for value in values.tolist()]


def test_cosine_of_codes_that_hardly_differ(backend: str) -> None:
    codebook = torch.tensor([[1.0, 0.0], [1.0, 1e-30]])
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    check(x, codebook, "cosine")


@pytest.mark.backends("cpu")
def test_parts_of_another_codebook_are_an_error(backend: str) -> None:
    x, prepared = torch.randn(5, 8), prepare_codebook(torch.randn(64, 8))
    with pytest.raises(ValueError, match=r"screen: expected shape|exact: expected shape"):
        OP(x, torch.randn(4096, 8), list(prepared.parts), prepared.layout, "l2")
    with pytest.raises(ValueError, match="exact: expected dtype"):
        OP(x, prepared.codebook, list(prepared.parts), prepared.layout, "cosine")


def test_a_prepared_codebook_is_a_copy(backend: str) -> None:
    codebook = torch.tensor([[0.0], [1.0]])
    prepared = prepare_codebook(codebook)
    codebook.zero_()
    assert nearest_code(torch.tensor([[1.0]]), prepared).tolist() == [1]
    if backend == "reference":
        assert nearest_code(torch.tensor([[1.0]], dtype=torch.float64), prepared).tolist() == [1]


def test_near_ties_are_told_apart(backend: str) -> None:
    codebook = torch.ones(64, 4)
    codebook[::2, 0] = 1 + 2.0**-23
    codebook[33, 0] = 1 - 2.0**-24
    x = torch.zeros(5, 4)
    assert nearest_code(x, codebook).tolist() == [33] * 5


def test_ties_take_the_lowest_index(backend: str) -> None:
    codebook = torch.randn(7, 3).repeat(5, 1)
    x = codebook + 0.01 * torch.randn_like(codebook)
    assert nearest_code(x, codebook).tolist() == brute_force(x, codebook[:7]).tolist()
    assert nearest_code(torch.zeros(300, 3), torch.zeros(500, 3)).eq(0).all()


@pytest.mark.backends("reference")
def test_overflow_in_float64_still_gives_an_index(backend: str) -> None:
    x = torch.full((2, 2), 1e200, dtype=torch.float64)
    codebook = torch.tensor([[-1e200, 0.0], [1e200, 1e200]], dtype=torch.float64)
    assert nearest_code(x, codebook).tolist() == [1, 1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_bad_row_gives_0_and_disturbs_no_other(backend: str, bad: float, metric: str) -> None:
    x, codebook = torch.randn(9, 4), torch.randn(16, 4)
    clean = nearest_code(x, codebook, metric=metric)
    x[4, 2] = bad
    clean[4] = 0
    assert torch.equal(nearest_code(x, codebook, metric=metric), clean)


@pytest.mark.backends("reference", "cpu")
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_chunks_and_batch_splits_do_not_matter(
    backend: str, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randint(-2, 3, (150, 3)) / 3
    codebook = torch.randint(-2, 3, (90, 3)) / 3
    whole = nearest_code(x, codebook, metric=metric)
    assert torch.equal(whole, torch.cat([nearest_code(row[None], codebook, metric=metric) for row in x]))
    monkeypatch.setattr(sys.modules["hitsr_fast.reference.nearest_code"], "_ROWS_PER_CHUNK", 7)
    assert torch.equal(whole, nearest_code(x, codebook, metric=metric))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("workspace", "programs"), [(2**23, 1), (2**23, 512), (1, 3)])
def test_cuts_do_not_matter(
    backend: str, metric: str, workspace: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in pieces, tiles shared out over programs, or all at once."""
    monkeypatch.setattr(nearest_code_triton, "_WORKSPACE", workspace)
    monkeypatch.setattr(nearest_code_triton, "_PROGRAMS", programs)
    x, codebook = placed(*problem("clustered", 2 * 300, 2 * 650, 6))
    check(x.view(2, 300, 6), codebook.view(2, 650, 6), metric)


@pytest.mark.backends("triton")
def test_as_shipped(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, shipped in SHIPPED.items():
        monkeypatch.setattr(*place, shipped)
    for warps in (4096, 0):  # a row a warp, or several
        monkeypatch.setattr(nearest_code_triton, "_WARPS", warps)
        for kind in ("clustered", "near ties"):
            for metric in ("l2", "cosine"):
                check(*placed(*problem(kind, 18, 140, 20)), metric)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_warp_rechecks_several_of_many_rows(metric: str) -> None:
    few, many = (nearest_code_triton.recheck_constants(32, metric, rows) for rows in (1024, 65536))
    assert few["ROWS"] == 1
    assert many["ROWS"] == {"l2": 4, "cosine": 2}[metric]  # in float64 a row takes twice the registers
    assert nearest_code_triton.OPTIONS["num_warps"] == 1


@pytest.mark.backends("triton")
def test_a_codebook_of_many_chunks_of_classes(backend: str) -> None:
    x, codebook = placed(*problem("clustered", 8, 4300, 2))
    check(x, codebook)
    check(x, codebook[:1].expand(4300, 2))


@given(seed=st.integers(0, 1000), power=st.integers(-20, 20))
def test_cosine_ignores_length(backend: str, seed: int, power: int) -> None:
    torch.manual_seed(seed)
    x, codebook = torch.randn(12, 5), torch.randn(9, 5)
    expected = torch.nn.functional.cosine_similarity(
        x.double()[:, None], codebook.double()[None], dim=2
    ).argmax(1)
    stretch = torch.exp2(torch.randint(-8, 9, (9, 1)))
    assert torch.equal(nearest_code(x, codebook, metric="cosine"), expected)
    assert torch.equal(nearest_code(x * 2.0**power, codebook * stretch, metric="cosine"), expected)


def test_cosine_of_zero_codes_and_rows(backend: str) -> None:
    codebook = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert nearest_code(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), codebook, metric="cosine").tolist() == [1, 0]


def test_groups_are_independent(backend: str) -> None:
    x, codebook = torch.randn(3, 10, 4), torch.randn(3, 8, 4)
    out = nearest_code(x, codebook)
    assert out.shape == (3, 10)
    for group in range(3):
        assert torch.equal(out[group], nearest_code(x[group], codebook[group]))
    assert nearest_code(x[:, :0], codebook).shape == (3, 0)
    assert nearest_code(x[:0], codebook[:0]).shape == (0, 10)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_maps(backend: str, metric: str) -> None:
    x, codebook = torch.randn(2, 6, 5, 7), torch.randn(40, 6)
    expected = reference(x.movedim(1, 3).reshape(-1, 6), codebook, metric).view(2, 5, 7)
    for view in (x, x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert torch.equal(nearest_code(view, codebook, metric=metric), expected)  # type: ignore[arg-type]
    assert torch.equal(nearest_code(x[:, :, 1:4, 2:], codebook, metric=metric), expected[:, 1:4, 2:])  # type: ignore[arg-type]
    assert nearest_code(x[:0], codebook).shape == (0, 5, 7)
    check(torch.zeros(0, 4), torch.zeros(2, 4), metric)
    check(torch.zeros(0, 3, 4), torch.zeros(0, 2, 4), metric)


@pytest.mark.parametrize("cut", [slice(None), slice(1, 4)])
def test_maps_are_not_copied_to_rows(cut: slice) -> None:
    x = torch.randn(2, 6, 5, 7)[:, :, cut, cut]
    maps, shape = as_maps(x)
    assert (maps.data_ptr(), tuple(maps.shape)) == (x.data_ptr(), (1, 2, *x.shape[2:], 6))
    assert shape == (2, *x.shape[2:])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("shape", [(40, 6), (3, 40, 6)])
def test_prepared_codebooks(backend: str, metric: str, shape: tuple[int, ...]) -> None:
    codebook = torch.randn(shape)
    x = torch.randn(*shape[:-2], 9, 6)
    prepared = prepare_codebook(codebook, metric=metric)  # type: ignore[arg-type]
    for _ in range(2):
        assert torch.equal(nearest_code(x, prepared, metric=metric), reference(x, codebook, metric))  # type: ignore[arg-type]
    other = "cosine" if metric == "l2" else "l2"
    with pytest.raises(ValueError, match=f"metric: expected {metric}, for which .* found '?{other}"):
        nearest_code(x, prepared, metric=other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="codebook: expected shape"):
        nearest_code(torch.randn(9, 5), prepared, metric=metric)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="codebook: expected finite values"):
        prepare_codebook(codebook / 0)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_each_backend_takes_its_own_packed_form(backend: str, metric: str) -> None:
    x, codebook = torch.randn(9, 6), torch.randn(40, 6)
    prepared = prepare_codebook(codebook, metric=metric)  # type: ignore[arg-type]
    assert prepared.layout == LAYOUT
    expected = reference(x, codebook, metric)
    for other in ("triton", "reference") if x.is_cuda else ("triton", "cpu", "reference"):
        with use_backend(other):
            assert torch.equal(nearest_code(x, prepared, metric=metric), expected)  # type: ignore[arg-type]
    found = nearest_code_triton.nearest_code_triton(x, codebook, [], "cpu:portable", metric)
    assert torch.equal(found, expected)


@pytest.mark.backends("cpu")
def test_rows_that_the_screen_cannot_decide_are_counted(backend: str) -> None:
    full_scans = torch.ops.hitsr_fast._nearest_code_full_scans
    before = full_scans()
    x, codebook = problem("random", 50, 600, 8)
    nearest_code(x, codebook)
    assert full_scans() == before
    x, codebook = problem("equal", 50, 600, 8)
    nearest_code(x, codebook)
    assert full_scans() == before + 50


@pytest.mark.backends("cpu")
def test_an_unknown_instruction_set_is_an_error(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CPU_ISA", "sse9")
    expected = pytest.raises(
        ValueError, match=r"HITSR_FAST_CPU_ISA: expected one of .*portable, found 'sse9'"
    )
    with use_instruction_set(None), expected:
        nearest_code(torch.zeros(1, 1), torch.zeros(1, 1))


def test_what_the_compiled_backends_leave_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for x, codebook, reason in [
        (torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2), "found x of float64"),
        (torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.float64), "found codebook of float64"),
        (torch.zeros(1, 257), torch.zeros(1, 257), "needs C of at most 256, found 257"),
    ]:
        assert nearest_code(x, codebook).tolist() == [0]
        for backend in ("cpu", "triton"):
            assert (refusal("nearest_code", backend, x, codebook) or "").endswith(reason)
    x, codebook = torch.zeros(65536, 1, 1), torch.zeros(65536, 1, 1)
    reason = "needs at most 65535 groups, found 65536"
    assert refusal("nearest_code", "triton", x, codebook) == reason


def test_strided_input_and_mixed_dtypes(backend: str) -> None:
    x, codebook = torch.randn(4, 20, dtype=torch.bfloat16), torch.randn(4, 9)
    check_exactly(x.T, codebook.T)
    check(x.T, codebook.T, "cosine")


@pytest.mark.parametrize(
    ("x", "codebook", "error", "message"),
    [
        ([[1.0]], torch.zeros(1, 1), TypeError, "x: expected a float16 or .* tensor, found list"),
        (
            torch.zeros(1, 1, dtype=torch.int64),
            torch.zeros(1, 1),
            TypeError,
            "x: expected dtype .* found int64",
        ),
        (torch.zeros(1, 1), None, TypeError, "codebook: expected .* found NoneType"),
        (torch.zeros(3), torch.zeros(1, 3), ValueError, r"x: expected shape \(N, C\), found \(3,\)"),
        (
            torch.zeros(1, 3),
            torch.zeros(5, 2),
            ValueError,
            r"codebook: expected shape \(K, C=3\), found \(5, 2\)",
        ),
        (torch.zeros(2, 1, 3), torch.zeros(1, 5, 3), ValueError, r"codebook: expected shape \(G=2, K, C=3\)"),
        (torch.zeros(1, 3), torch.zeros(0, 3), ValueError, "codebook: expected K and C of at least 1"),
        (torch.zeros(1, 0), torch.zeros(3, 0), ValueError, "codebook: expected K and C of at least 1"),
        (torch.zeros(1, 1), torch.zeros(1, 1, device="meta"), ValueError, "codebook: expected device cpu"),
        (torch.zeros(1, 1), torch.tensor([[torch.nan]]), ValueError, "codebook: expected finite values"),
        (torch.zeros(0, 1), torch.tensor([[torch.inf]]), ValueError, "codebook: expected finite values"),
    ],
)
def test_bad_arguments(x: object, codebook: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nearest_code(x, codebook)  # type: ignore[arg-type]


def test_unknown_metric() -> None:
    with pytest.raises(ValueError, match="metric: expected one of l2, cosine, found 'dot'"):
        nearest_code(torch.zeros(1, 1), torch.zeros(1, 1), metric="dot")  # type: ignore[arg-type]


def test_compiled_calls_check_their_values() -> None:
    x, codebook = torch.randn(6, 3), torch.randn(5, 3)
    compiled = torch.compile(lambda x, e: nearest_code(x * 2, e) + 1, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="codebook: expected finite values"):
        compiled(x, codebook / 0)


# --- the bound of Triton's screen


class Launch:
    """In place of a kernel: remembers what it was started with."""

    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] = ()

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def start(*arguments: Any, **constants: Any) -> None:
            self.arguments = arguments

        return start


def share_of_the_bound(x: Tensor, codebook: Tensor, metric: str) -> float:
    """The largest error of the screen's minima over the bound that the kernel computed for it."""
    _, parts = pack_triton(codebook, metric)
    mean, _, _, _, bounds = parts
    recheck, kernels = Launch(), importlib.import_module("hitsr_fast.kernels.nearest_code")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_nearest_code_recheck_kernel", recheck)
        nearest_code_triton.nearest_code_triton(x, codebook, list(parts), LAYOUT, metric)
    minima, margins = recheck.arguments[3:5]
    rows, codes = x.shape[0], codebook.shape[0]
    minima = minima.view(-1, rows, 4).movedim(1, 0).flatten(1)[:, : -(-codes // 32)]
    slack = margins.view(3, rows)[0]
    assert (slack >= 0).all()

    before, after = bounds[0, :2].double()
    centre = mean.double() / before
    centred = (x.double() - centre) * (before * after)
    given = codebook.double()
    if metric == "cosine":
        given = torch.nn.functional.normalize(given, dim=1)
    given = given - centre
    given = given * (before * after)
    half_norms = 0 if metric == "cosine" else given.square().sum(1) / 2
    scores = half_norms - centred @ given.T
    padded = torch.nn.functional.pad(scores, (0, -codes % 32), value=torch.inf)
    exact = padded.view(rows, -1, 32).amin(2)
    error = minima - exact
    if metric == "cosine":  # codes are centred, on what is not kept: that moves all scores of a row alike
        error -= (error.amax(1, keepdim=True) + error.amin(1, keepdim=True)) / 2
    return (error.abs() / (slack[:, None].double() / 2)).max().item()


on_the_interpreter = pytest.mark.backends("triton")
# Rows of 1e30 are beyond the range of the bound for cosine, where only codes are brought to a scale.
BOUNDED = [(m, kind) for m in ("l2", "cosine") for kind in KINDS if (m, kind) != ("cosine", "huge")]


@on_the_interpreter
@pytest.mark.parametrize(("metric", "kind"), BOUNDED)
def test_the_bound_holds(backend: str, metric: str, kind: str) -> None:
    """Rounding to float16 is the kernel's own; sums are the interpreter's, in float32."""
    for channels in (3, 16, 40):
        assert share_of_the_bound(*problem(kind, 40, 200, channels), metric) <= 1


@on_the_interpreter
def test_the_bound_is_not_idle(backend: str) -> None:
    assert share_of_the_bound(*problem("random", 100, 300, 3), "l2") > 0.1


@on_the_interpreter
def test_values_that_float16_drops(backend: str) -> None:
    """One code far out makes all others subnormal; a row of mixed magnitudes loses its small values."""
    x, codebook = torch.randn(40, 5), torch.randn(200, 5) * 2.0**-14
    codebook[3] *= 2.0**20
    x[:, 1] *= 2.0**-30
    assert share_of_the_bound(x, codebook, "l2") <= 1
    check(x, codebook, "l2")


@pytest.fixture(params=["Ampere", "Hopper", "Blackwell", "CDNA3"])
def _tensor_core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Products as a chip's tensor cores sum them, by a bit-accurate model; of each, whether it shows."""
    from mmasim import amd, nv_ptx
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    depth, multiply = {
        "Ampere": (16, lambda: nv_ptx.MMA("Ampere", "m16n8k16.f32.f16.f16.f32")),
        "Hopper": (16, lambda: nv_ptx.WGMMA("Hopper", "m64n64k16.f32.f16.f16")),
        "Blackwell": (16, lambda: nv_ptx.TCGen05MMA("Blackwell", "m128n64k16.kind::f16.f32.f16.f16")),
        "CDNA3": (8, lambda: amd.MFMA("CDNA3", "f32_32x32x8_f16")),
    }[request.param]
    instruction = multiply()
    interpreted, differs = InterpreterBuilder.create_dot, []

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: object) -> Any:
        left, right, total = (torch.from_numpy(np.array(operand.data)) for operand in (a, b, d))
        for first in range(0, left.shape[1], depth):
            total = instruction(left[:, first : first + depth], right[first : first + depth], total)
        differs.append(not np.array_equal(total.numpy(), interpreted(self, a, b, d, *rest).data))
        return TensorHandle(total.numpy(), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    return differs


@on_the_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(("metric", "kind"), BOUNDED)
def test_the_bound_holds_on_tensor_cores(
    backend: str, metric: str, kind: str, _tensor_core: list[bool]
) -> None:
    for channels in (8, 32, 100):
        x, codebook = problem(kind, 64, 300, channels)
        assert share_of_the_bound(x, codebook, metric) <= 1
        check(x, codebook, metric)
    assert any(_tensor_core) or kind == "equal"
