"""`nearest_code` against float64 brute force, on ordinary and on adversarial inputs."""

from __future__ import annotations

import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.ops import nearest_code

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OP = torch.ops.hitsr_fast.nearest_code.default


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


@given(
    rows=st.integers(0, 20),
    codes=st.integers(1, 12),
    channels=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    levels=st.sampled_from([1, 2, 5, 1000]),
    scale=st.sampled_from([1.0, 2.0**-60, 2.0**60]),
    seed=st.integers(0, 1000),
)
def test_equals_exact_arithmetic(
    rows: int, codes: int, channels: int, dtype: torch.dtype, levels: int, scale: float, seed: int
) -> None:
    # Few levels make ties and duplicate codes likely; float16 has no room for the large scales.
    scale = 1.0 if dtype == torch.float16 else scale
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-levels, levels + 1, (rows, channels), generator=generator).to(dtype) * scale
    codebook = torch.randint(-levels, levels + 1, (codes, channels), generator=generator).to(dtype) * scale
    assert torch.equal(nearest_code(x, codebook), brute_force(x, codebook))


@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_equals_exact_arithmetic_far_from_the_origin(offset: float) -> None:
    x, codebook = torch.randn(40, 6) + offset, torch.randn(30, 6) + offset
    assert torch.equal(nearest_code(x, codebook), brute_force(x, codebook))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_values(size: float) -> None:
    x, codebook = torch.randn(40, 6) * size, torch.randn(30, 6) * size
    assert torch.equal(nearest_code(x, codebook), brute_force(x, codebook))


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
    torch.library.opcheck(OP, (torch.randn(6, 3), torch.randn(5, 3), metric))
    torch.library.opcheck(OP, (torch.randn(2, 0, 3), torch.randn(2, 5, 3, requires_grad=True), metric))


def test_compiles_without_a_graph_break() -> None:
    x, codebook = torch.randn(6, 3), torch.randn(5, 3)
    compiled = torch.compile(lambda x, e: nearest_code(x * 2, e) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, codebook), nearest_code(x * 2, codebook) + 1)
    with pytest.raises(ValueError, match="codebook: expected finite values"):
        compiled(x, codebook / 0)
