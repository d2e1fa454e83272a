"""`nearest_code` against float64 brute force, on ordinary and on adversarial inputs, on every backend.

Each test runs once for the reference and once for every instruction set that the compiled backend has here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast import extension
from hitsr_fast.dispatch import BackendUnavailableError, use_backend
from hitsr_fast.ops import nearest_code, nearest_code_cpu, prepare_codebook
from hitsr_fast.ops.nearest_code_inputs import as_maps
from hitsr_fast.reference.nearest_code import nearest_code as reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OP = torch.ops.hitsr_fast.nearest_code.default
ISAS = nearest_code_cpu.instruction_sets() if extension.unavailable() is None else []


@pytest.fixture(scope="module", params=["reference", *ISAS], autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            with use_backend("reference"):
                yield "reference"
        else:
            patch.setenv("HITSR_FAST_CPU_ISA", request.param)
            yield request.param  # not forced: the reference still takes what is float64


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
def few_values(draw: st.DrawFn, dtypes: Sequence[torch.dtype]) -> tuple[Tensor, Tensor]:
    """Rows and codes of a few whole numbers, at several scales: ties and duplicate codes are likely."""
    rows, codes, channels = draw(st.integers(0, 20)), draw(st.integers(1, 12)), draw(st.integers(1, 9))
    dtype, levels = draw(st.sampled_from(dtypes)), draw(st.sampled_from([1, 2, 5, 1000]))
    # float16 has no room for the large scales.
    scale = 1.0 if dtype == torch.float16 else draw(st.sampled_from([1.0, 2.0**-60, 2.0**60]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randint(-levels, levels + 1, (rows, channels), generator=generator)
    codebook = torch.randint(-levels, levels + 1, (codes, channels), generator=generator)
    return x.to(dtype) * scale, codebook.to(dtype) * scale


@given(problem=few_values(DTYPES))
def test_equals_exact_arithmetic(problem: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(nearest_code(*problem), brute_force(*problem))


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_equals_exact_arithmetic_far_from_the_origin(offset: float) -> None:
    x, codebook = torch.randn(40, 6) + offset, torch.randn(30, 6) + offset
    assert torch.equal(nearest_code(x, codebook), brute_force(x, codebook))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_values(size: float) -> None:
    x, codebook = torch.randn(40, 6) * size, torch.randn(30, 6) * size
    assert torch.equal(nearest_code(x, codebook), brute_force(x, codebook))


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(
    ("rows", "codes", "channels"),
    [(300, 700, 5), (97, 257, 32), (50, 1030, 33), (130, 16, 1), (20, 300, 256)],
)
def test_equals_the_definition(kind: str, metric: str, rows: int, codes: int, channels: int) -> None:
    x, codebook = problem(kind, rows, codes, channels)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = x.to(dtype), codebook.to(dtype)
        if a.isfinite().all() and b.isfinite().all():  # float16 has no 1e30
            assert torch.equal(nearest_code(a, b, metric=metric), reference(a, b, metric))  # type: ignore[arg-type]


def test_a_hundred_thousand_rows_equal_the_definition() -> None:
    rows = 100_000 // len(KINDS)
    for seed, kind in enumerate(KINDS):
        x, codebook = problem(kind, rows, 512, 8, seed)
        assert torch.equal(nearest_code(x, codebook), reference(x, codebook, "l2"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_million_rows_equal_the_definition(kind: str) -> None:
    for seed in range(10):
        x, codebook = problem(kind, 20_000, 4096, 32, seed)
        assert torch.equal(nearest_code(x, codebook), reference(x, codebook, "l2"))


def test_values_at_the_ends_of_the_range() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[largest, -largest], [1e-45, 0.0], [largest, largest], [-0.0, 1.0], [1.0, torch.nan]])
    codebook = torch.tensor(
        [[-largest, largest], [0.0, 0.0], [largest, -largest], [1e-45, 1e-45], [1.0, 1.0]]
    )
    for codes in (codebook, codebook[1:2], codebook[3:4] * torch.arange(1, 40)[:, None], codebook[1:]):
        assert torch.equal(nearest_code(x, codes), reference(x, codes, "l2"))


def test_padding_is_no_candidate() -> None:
    # Zero is nearer than either code, and float32 cannot tell the two apart.
    x = torch.tensor([[0.7, 0.9]])
    codebook = torch.tensor(
        [[1.704636812210083, 1.439172387123108], [1.8396443128585815, 0.8651784062385559]]
    )
    assert torch.equal(nearest_code(x, codebook), brute_force(x, codebook))


def test_differences_beyond_the_range_of_float32() -> None:
    largest = torch.finfo(torch.float32).max
    codebook = torch.tensor([[-0.45, 0.0], [-0.38, 0.5], *[[0.0, -0.99]] * 14]) * largest
    x = torch.tensor([[0.6, 0.0]]) * largest
    assert torch.equal(nearest_code(x, codebook), brute_force(x, codebook))


def test_cosine_of_codes_that_hardly_differ() -> None:
    codebook = torch.tensor([[1.0, 0.0], [1.0, 1e-30]])
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    assert torch.equal(nearest_code(x, codebook, metric="cosine"), reference(x, codebook, "cosine"))


def test_parts_of_another_codebook_are_an_error(_backend: str) -> None:
    if _backend == "reference":
        return
    x, prepared = torch.randn(5, 8), prepare_codebook(torch.randn(64, 8))
    with pytest.raises(ValueError, match=r"screen: expected shape|exact: expected shape"):
        OP(x, torch.randn(4096, 8), list(prepared.parts), prepared.layout, "l2")
    with pytest.raises(ValueError, match="exact: expected dtype"):
        OP(x, prepared.codebook, list(prepared.parts), prepared.layout, "cosine")


def test_a_prepared_codebook_is_a_copy() -> None:
    codebook = torch.tensor([[0.0], [1.0]])
    prepared = prepare_codebook(codebook)
    codebook.zero_()
    assert nearest_code(torch.tensor([[1.0]]), prepared).tolist() == [1]
    assert nearest_code(torch.tensor([[1.0]], dtype=torch.float64), prepared).tolist() == [1]


def test_near_ties_are_told_apart() -> None:
    codebook = torch.ones(64, 4)
    codebook[::2, 0] = 1 + 2.0**-23
    codebook[33, 0] = 1 - 2.0**-24
    x = torch.zeros(5, 4)
    assert nearest_code(x, codebook).tolist() == [33] * 5


def test_ties_take_the_lowest_index() -> None:
    codebook = torch.randn(7, 3).repeat(5, 1)
    x = codebook + 0.01 * torch.randn_like(codebook)
    assert torch.equal(nearest_code(x, codebook), brute_force(x, codebook[:7]))
    assert nearest_code(torch.zeros(300, 3), torch.zeros(500, 3)).eq(0).all()


def test_overflow_in_float64_still_gives_an_index() -> None:
    x = torch.full((2, 2), 1e200, dtype=torch.float64)
    assert nearest_code(x, torch.tensor([[-1e200, 0.0], [1e200, 1e200]], dtype=torch.float64)).tolist() == [
        1,
        1,
    ]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_bad_row_gives_0_and_disturbs_no_other(bad: float, metric: str) -> None:
    x, codebook = torch.randn(9, 4), torch.randn(16, 4)
    clean = nearest_code(x, codebook, metric=metric)
    x[4, 2] = bad
    clean[4] = 0
    assert torch.equal(nearest_code(x, codebook, metric=metric), clean)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_chunks_and_batch_splits_do_not_matter(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(-2, 3, (150, 3)) / 3
    codebook = torch.randint(-2, 3, (90, 3)) / 3
    whole = nearest_code(x, codebook, metric=metric)
    assert torch.equal(whole, torch.cat([nearest_code(row[None], codebook, metric=metric) for row in x]))
    monkeypatch.setattr(sys.modules["hitsr_fast.reference.nearest_code"], "_ROWS_PER_CHUNK", 7)
    assert torch.equal(whole, nearest_code(x, codebook, metric=metric))


@given(seed=st.integers(0, 1000), power=st.integers(-20, 20))
def test_cosine_ignores_length(seed: int, power: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, codebook = torch.randn(12, 5, generator=generator), torch.randn(9, 5, generator=generator)
    expected = torch.nn.functional.cosine_similarity(
        x.double()[:, None], codebook.double()[None], dim=2
    ).argmax(1)
    stretch = torch.exp2(torch.randint(-8, 9, (9, 1), generator=generator))
    assert torch.equal(nearest_code(x, codebook, metric="cosine"), expected)
    assert torch.equal(nearest_code(x * 2.0**power, codebook * stretch, metric="cosine"), expected)


def test_cosine_of_zero_codes_and_rows() -> None:
    codebook = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert nearest_code(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), codebook, metric="cosine").tolist() == [1, 0]


def test_groups_are_independent() -> None:
    x, codebook = torch.randn(3, 10, 4), torch.randn(3, 8, 4)
    out = nearest_code(x, codebook)
    assert out.shape == (3, 10)
    for group in range(3):
        assert torch.equal(out[group], nearest_code(x[group], codebook[group]))
    assert nearest_code(x[:, :0], codebook).shape == (3, 0)
    assert nearest_code(x[:0], codebook[:0]).shape == (0, 10)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_maps(metric: str) -> None:
    x, codebook = torch.randn(2, 6, 5, 7), torch.randn(40, 6)
    expected = reference(x.movedim(1, 3).reshape(-1, 6), codebook, metric).view(2, 5, 7)
    for view in (x, x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert torch.equal(nearest_code(view, codebook, metric=metric), expected)  # type: ignore[arg-type]
    assert torch.equal(nearest_code(x[:, :, 1:4, 2:], codebook, metric=metric), expected[:, 1:4, 2:])  # type: ignore[arg-type]
    assert nearest_code(x[:0], codebook).shape == (0, 5, 7)


@pytest.mark.parametrize("cut", [slice(None), slice(1, 4)])
def test_maps_are_not_copied_to_rows(cut: slice) -> None:
    x = torch.randn(2, 6, 5, 7)[:, :, cut, cut]
    maps, shape = as_maps(x)
    assert (maps.data_ptr(), tuple(maps.shape)) == (x.data_ptr(), (1, 2, *x.shape[2:], 6))
    assert shape == (2, *x.shape[2:])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("shape", [(40, 6), (3, 40, 6)])
def test_prepared_codebooks(metric: str, shape: tuple[int, ...]) -> None:
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


def test_threads_do_not_matter() -> None:
    x, codebook = problem("near ties", 5000, 300, 8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = nearest_code(x, codebook)
        torch.set_num_threads(3)
        assert torch.equal(nearest_code(x, codebook), alone)
    finally:
        torch.set_num_threads(threads)


def test_rows_that_the_screen_cannot_decide_are_counted(_backend: str) -> None:
    if _backend == "reference":
        return  # it has no screen to overflow
    before = nearest_code_cpu.full_scans()
    x, codebook = problem("random", 50, 600, 8)
    nearest_code(x, codebook)
    assert nearest_code_cpu.full_scans() == before
    x, codebook = problem("equal", 50, 600, 8)
    nearest_code(x, codebook)
    assert nearest_code_cpu.full_scans() == before + 50


def test_an_unknown_instruction_set_is_an_error(_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if _backend == "reference":
        return
    monkeypatch.setenv("HITSR_FAST_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=r"HITSR_FAST_CPU_ISA: expected one of .*portable, found 'sse9'"):
        nearest_code(torch.zeros(1, 1), torch.zeros(1, 1))


def test_what_the_cpu_backend_leaves_to_the_reference() -> None:
    for x, codebook, reason in [
        (torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2), "found x of float64"),
        (torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.float64), "found codebook of float64"),
        (torch.zeros(1, 257), torch.zeros(1, 257), "needs C of at most 256, found 257"),
    ]:
        assert nearest_code(x, codebook).tolist() == [0]
        with use_backend("cpu"), pytest.raises(BackendUnavailableError, match=reason if ISAS else "cpu"):
            nearest_code(x, codebook)


def test_strided_input_and_mixed_dtypes() -> None:
    x, codebook = torch.randn(4, 20, dtype=torch.bfloat16), torch.randn(4, 9)
    assert torch.equal(nearest_code(x.T, codebook.T), brute_force(x.T, codebook.T))


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


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_opcheck(metric: str) -> None:
    codebook = torch.randn(5, 3)
    prepared = prepare_codebook(codebook, metric=metric)  # type: ignore[arg-type]
    torch.library.opcheck(OP, (torch.randn(6, 3), codebook, [], "", metric))
    torch.library.opcheck(OP, (torch.randn(6, 3), codebook, list(prepared.parts), prepared.layout, metric))
    torch.library.opcheck(
        OP, (torch.randn(2, 0, 3), torch.randn(2, 5, 3, requires_grad=True), [], "", metric)
    )
    torch.library.opcheck(OP, (torch.randn(2, 3, 4, 5), codebook, [], "", metric))


def test_compiles_without_a_graph_break() -> None:
    x, codebook = torch.randn(6, 3), torch.randn(5, 3)
    compiled = torch.compile(lambda x, e: nearest_code(x * 2, e) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, codebook), nearest_code(x * 2, codebook) + 1)
    with pytest.raises(ValueError, match="codebook: expected finite values"):
        compiled(x, codebook / 0)
