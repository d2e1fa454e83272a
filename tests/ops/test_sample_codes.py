"""`sample_codes`: the definition against VAR's own steps, and all backends equal to it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import sample_codes
from hitsr_fast.ops.sample_codes import random_state, sampling_settings
from hitsr_fast.reference import sample_codes as definition
from tests.ops.backends import INTERPRETED, refusal, sizes
from tests.ops.chi_square import chi_square, chi_square_bound

OP = torch.ops.hitsr_fast.sample_codes.default
SEEDS = st.integers(0, 2**31)
# Rows and codes.
SIZES = {
    "any": [(40, 1), (40, 2), (30, 63), (30, 64), (30, 65), (20, 1000), (6, 4096)],
    "interpreted": [(2, 1), (2, 2), (3, 63), (2, 65), (2, 1000)],
    "gpu": [(50, 1), (50, 65), (1024, 4096), (20, 16384)],
}
on_compiled_backends = pytest.mark.backends("cpu", "triton")

OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.9},
    {"top_k": 11, "top_p": 0.6, "temperature": 1.7},
    {"top_p": 1.0, "temperature": 0.25},
    {"top_p": 1e-20},
    {"top_k": 5000, "top_p": 1 - 2.0**-53, "temperature": 1e30},
    {"temperature": 1e-30},
]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits_of(kind: str, rows: int, codes: int) -> Tensor:
    x = 3 * torch.randn(rows, codes)
    if kind == "ties":
        x = torch.randint(-2, 3, (rows, codes)) * 0.5
    elif kind == "equal":
        x = torch.full((rows, codes), -7.25)
    elif kind == "huge":
        x = x * 1e38
    elif kind == "tiny":
        x = x * 1e-42
    elif kind == "masked":
        x[torch.rand(rows, codes) < 0.7] = -torch.inf
    elif kind == "bad":
        for value in (torch.nan, torch.inf, -torch.inf, -0.0, 0.0):
            x[torch.rand(rows, codes) < 0.1] = value
        x[:1], x[1:2], x[2:3] = torch.nan, -torch.inf, torch.inf
    return x


KINDS = ("random", "ties", "equal", "huge", "tiny", "masked", "bad")


def check(logits: Tensor, seed: int = 0, **options: Any) -> Tensor:
    """The draws, which are those of the definition."""
    found = sample_codes(logits, generator=generator(seed), **options)
    with use_backend("reference"):
        expected = sample_codes(logits, generator=generator(seed), **options)
    assert torch.equal(found, expected), (tuple(logits.shape), options)
    return found


@on_compiled_backends
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_backends_draw_the_same(backend: str, kind: str, guidance: float) -> None:
    for size in sizes(backend, SIZES):
        logits, uncond = logits_of(kind, *size), logits_of(kind, *size)
        for seed, options in enumerate(OPTIONS):
            check(logits, seed, uncond_logits=uncond, guidance=guidance, **options)


@pytest.mark.parametrize("guidance", [0.0, 1.3, -0.4])
def test_numbers_in_memory_are_those_of_the_call(backend: str, guidance: float) -> None:
    """Of several calls, which share all but their guidance; those of the call itself are not looked at."""
    logits, uncond = 3 * torch.randn(2, 3 if INTERPRETED else 9, 40)
    other = uncond if guidance else None
    drawn = []
    for number, options in enumerate(OPTIONS):
        top_k, top_p, temperature = (
            options.get(*pair) for pair in (("top_k", 0), ("top_p", 0.0), ("temperature", 1.0))
        )
        settings = sampling_settings([5.0, guidance], top_k, top_p, temperature, torch.device("cpu"))
        for state in (None, torch.tensor([number, 77])):
            expected = OP(logits, other, state, guidance, top_k, top_p, temperature, None)
            assert torch.equal(OP(logits, other, state, 9.0, 2, 0.1, 0.2, settings[1]), expected), options
            assert torch.equal(OP(logits, other, state, 9.0, 2, 0.1, 0.2, settings.T.clone().T[1]), expected)
            drawn.append(expected)
    assert len({tuple(codes.tolist()) for codes in drawn}) > (3 if INTERPRETED else 5)  # fewer rows


def test_nobody_looks_at_numbers_in_memory() -> None:
    """The definition runs on fake tensors, at which nobody can look."""
    with FakeTensorMode():
        logits, settings = torch.zeros(3, 8), torch.zeros(5, dtype=torch.int64)
        codes = definition.sample_codes(logits, logits, settings[:2], 0.0, 0, 0.0, 1.0, settings)
        assert codes.shape == (3,)


@on_compiled_backends
@given(seed=SEEDS, codes=st.integers(1, 9), levels=st.integers(1, 5))
def test_backends_draw_the_same_from_few_values(backend: str, seed: int, codes: int, levels: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randint(levels, (6 if INTERPRETED else 8, codes)).float() / 2
    top_k, top_p = int(torch.randint(2, codes + 3, ())), float(torch.randint(0, 17, ())) / 16
    check(logits, seed, top_k=top_k, top_p=top_p)


@on_compiled_backends
def test_the_shapes_of_a_model(backend: str) -> None:
    check(torch.randn(4, 4096), top_k=900, top_p=0.96)
    check(torch.randn(2, 16384), top_p=0.9)
    check(torch.zeros(0, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_and_strides(backend: str, dtype: torch.dtype) -> None:
    logits, uncond = (torch.randn(2, 30, 6, dtype=dtype) for _ in range(2))
    options: dict[str, Any] = {"guidance": 2.0, "top_k": 9, "top_p": 0.9}
    found = check(logits.mT, uncond_logits=uncond.mT, **options)
    assert torch.equal(found, check(logits.float().mT, uncond_logits=uncond.float().mT, **options))
    assert found.shape == (2, 6) and found.dtype == torch.int64
    check(logits[:, ::2], uncond_logits=uncond[:, ::2], **options)
    assert check(logits[0, :, 0], uncond_logits=logits[0, :, 0], **options).shape == ()


def test_rows_take_their_own_words(backend: str) -> None:
    """Row r takes block r of Philox: a call with fewer rows draws the same for them."""
    logits = torch.randn(60, 70)
    whole = sample_codes(logits, generator=generator(3))
    assert torch.equal(sample_codes(logits[:17], generator=generator(3)), whole[:17])
    assert torch.equal(sample_codes(logits.view(3, 20, 70), generator=generator(3)), whole.view(3, 20))
    for shape in [(0, 5), (2, 0, 5)]:
        assert sample_codes(torch.zeros(shape)).shape == shape[:-1]


# --- the definition


def var_kept(x: Tensor, top_k: int, top_p: float) -> Tensor:
    """What VAR's `sample_with_top_k_top_p_` keeps of float64 rows without ties."""
    kept = torch.ones_like(x, dtype=torch.bool)
    if top_k > 0:
        kept = x >= x.topk(min(top_k, x.shape[1]), dim=1).values[:, -1:]
    if top_p > 0:
        ascending, order = x.masked_fill(~kept, -torch.inf).sort(dim=1)
        dropped = ascending.softmax(1).cumsum(1) <= 1 - top_p
        dropped[:, -1] = False
        kept &= ~torch.zeros_like(kept).scatter(1, order, dropped)
    return kept


@given(
    seed=SEEDS,
    top_k=st.integers(2, 14),
    top_p=st.floats(0.01, 0.99),
    temperature=st.floats(0.3, 3.0),
    guidance=st.floats(0.0, 4.0),
)
def test_keeps_what_var_keeps(
    seed: int, top_k: int, top_p: float, temperature: float, guidance: float
) -> None:
    random = generator(seed)
    cond, uncond = (torch.randn(12, generator=random) for _ in range(2))
    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    exact = (1 + guidance) * cond.double() - guidance * uncond.double()
    kept = var_kept(exact[None] / temperature, top_k, top_p)[0]
    rows = (cond.expand(4000, 12), uncond.expand(4000, 12))
    drawn = sample_codes(
        rows[0], uncond_logits=rows[1], guidance=guidance, generator=random, **options
    ).bincount(minlength=12)
    assert not drawn[~kept].any()
    share = (exact / temperature).masked_fill(~kept, -torch.inf).softmax(0)
    assert (drawn[share > 0.01] > 0).all()  # a miss has a chance of 4e-18


@given(seed=SEEDS, levels=st.integers(1, 4))
def test_greedy_takes_the_lowest_index_on_ties(seed: int, levels: int) -> None:
    logits = torch.randint(levels, (8, 12), generator=generator(seed)).float()
    for row, chosen in zip(logits.tolist(), sample_codes(logits, top_k=1).tolist(), strict=True):
        assert chosen == row.index(max(row))


def test_zeros_are_equal(backend: str) -> None:
    """-0 counts as 0."""
    zeros = torch.tensor([[-0.0, 0.0], [0.0, -0.0]])
    assert sample_codes(zeros, top_k=1).tolist() == [0, 0]
    third = torch.tensor([-0.0, 0.0, -1.0, 0.0]).expand(40, 4)
    assert set(sample_codes(third, top_k=2, generator=generator(0)).tolist()) == {0, 1, 3}


def test_at_most_keeps_no_more(backend: str) -> None:
    """Weights 2, 1 and 1: the two small ones hold a share of exactly `1 - top_p`, so they go."""
    logits = torch.tensor([0.0, -1.0, -1.0]).expand(40, 3)
    drawn = sample_codes(logits, top_p=0.5, temperature=math.log2(math.e), generator=generator(0))
    assert not drawn.any()


def test_equal_logits_stay_or_go_together() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]).expand(4000, 5)

    def drawn(**options: Any) -> set[int]:
        return set(sample_codes(logits, generator=generator(0), **options).tolist())

    assert drawn(top_k=2) == {0, 1, 2, 3}
    share = torch.softmax(logits[0], 0)
    assert drawn(top_p=float(share[0]) + 0.01) == {0, 1, 2, 3}
    assert drawn(top_p=float(share[0]) - 0.01) == {0}
    assert drawn(top_p=1 - float(share[4]) - 0.01) == {0, 1, 2, 3}
    assert drawn(top_p=1 - float(share[4]) + 0.01) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 40}, {"top_p": 0.8}, {"top_k": 50, "top_p": 0.9, "temperature": 0.7}]
)
def test_the_distribution(options: dict[str, Any]) -> None:
    """Chi-square of a hundred thousand draws, of a fixed seed."""
    x = torch.randn(100, generator=generator(1))
    exact = x.double()[None] / options.get("temperature", 1.0)
    kept = var_kept(exact, options.get("top_k", 0), options.get("top_p", 0.0))
    probabilities = exact.masked_fill(~kept, -torch.inf).softmax(1)[0]
    drawn = sample_codes(x.expand(100_000, 100), generator=generator(2), **options)
    freedom = int((probabilities * len(drawn) >= 5).sum())
    assert freedom >= 10
    assert chi_square(drawn, probabilities) < chi_square_bound(freedom)


def test_the_chi_square_sees_a_bias() -> None:
    x = torch.randn(100, generator=generator(1))
    drawn = sample_codes(x.expand(100_000, 100), generator=generator(2), temperature=1.05)
    assert chi_square(drawn, x.double().softmax(0)) > chi_square_bound(100)


def test_places_in_the_grid_are_independent() -> None:
    """Chi-square of pairs of draws: of neighbouring rows, and of two calls."""
    x = torch.randn(8)
    share = x.double().softmax(0)
    random = generator(5)
    first, second = (sample_codes(x.expand(40_000, 8), generator=random) for _ in range(2))
    pairs = (share[:, None] * share).flatten()
    for a, b in ((first[:-1:2], first[1::2]), (first, second)):
        assert chi_square(8 * a + b, pairs) < chi_square_bound(63)


def test_philox_gives_the_published_words() -> None:
    """The known answers of Random123, kat_vectors, for philox4x32 of 10 rounds."""
    f = 0xFFFFFFFF
    for given_words, expected in [
        ((0, 0, 0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((f, f, f, f, f, f), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]:
        a, b, c, d, k0, k1 = map(torch.tensor, given_words)
        assert tuple(map(int, definition.philox((a, b, c, d), (k0, k1)))) == expected


def philox_words(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 in Python's integers, as the paper writes it."""
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            second >> 32 ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def words_of_row(seed: int, offset: int, row: int) -> list[int]:
    return philox_words([offset & 0xFFFFFFFF, offset >> 32, row, 0], [seed & 0xFFFFFFFF, seed >> 32])


def test_a_fraction_is_the_first_two_words() -> None:
    high, low = definition.random_fractions(torch.tensor([0, 0]), 1)
    assert (int(high), int(low)) == (0x6627E8D5 >> 1, 0xE169C58D >> 1)
    seed, offset = 0x123456789ABCDEF, 0x7EDCBA9876543210
    words = [words_of_row(seed, offset, row) for row in range(5)]
    for place, found in enumerate(definition.random_fractions(torch.tensor([seed, offset]), 5)):
        assert found.tolist() == [block[place] >> 1 for block in words]


def test_the_second_word_counts(backend: str) -> None:
    """Among 15000 equal codes, with an offset whose first word, taken twice, would give another code."""
    seed, offset, codes = 0, 67195, 15_000
    first, second, *_ = (word >> 1 for word in words_of_row(seed, offset, 0))
    code, wrong = (((first << 31) + low) * codes * 2**30 >> 62 >> 30 for low in (second, first))
    assert code != wrong
    logits = torch.zeros(1, 1).expand(1, codes)
    assert OP(logits, None, torch.tensor([seed, offset]), 0.0, 0, 0.0, 1.0, None).item() == code


@given(total=st.integers(0, 2**61 - 1), share=st.integers(0, 2**62 - 1))
def test_fractions_are_exact(total: int, share: int) -> None:
    assert int(definition.fraction(torch.tensor(total), *definition.split(share))) == total * share >> 62


def test_weights_are_exponentials() -> None:
    """Off by less than two units, or 2^-20 of themselves where that is more."""
    x = torch.cat([torch.linspace(-25, 0, 100_000), torch.linspace(-1e-3, 0, 1000)])[None]
    for temperature in (0.3, 1.0, 5.0):
        weights = definition.code_weights(x, definition.power_scale(temperature))
        exact = (x.double() / temperature).exp() * 2.0**30
        # The exponent itself is rounded: to 2^-24 of up to 40.
        assert ((weights - exact).abs() <= 2 + exact * 2.0**-18).all()
        near = exact > 2.0**29
        assert ((weights - exact).abs()[near] <= exact[near] * 2.0**-20).all()
    assert definition.code_weights(torch.zeros(1, 1), definition.power_scale(1.0)).item() == 2**30


def test_words_of_a_state_all_count() -> None:
    """A change of any bit of seed or offset changes the draws."""
    logits = torch.zeros(64, 4096)
    plain = OP(logits, None, torch.tensor([5, 9]), 0.0, 0, 0.0, 1.0, None)
    for place in (0, 1):
        for bit in (0, 31, 32, 62):
            state = torch.tensor([5, 9])
            state[place] ^= 1 << bit
            assert (OP(logits, None, state, 0.0, 0, 0.0, 1.0, None) != plain).float().mean() > 0.9


# --- the op


def test_the_generator_moves_on_unless_greedy() -> None:
    logits = torch.randn(50, 30)
    random = generator(4)
    first = sample_codes(logits, generator=random)
    assert not torch.equal(first, sample_codes(logits, generator=random))
    assert torch.equal(first, sample_codes(logits, generator=generator(4)))
    before = random.get_state()
    sample_codes(logits, top_k=1, generator=random)
    assert torch.equal(before, random.get_state())
    torch.manual_seed(7)
    first = sample_codes(logits)
    torch.manual_seed(7)
    assert torch.equal(first, sample_codes(logits))
    assert not torch.equal(first, sample_codes(logits))
    state = random_state(torch.device("cpu"), generator(4))
    assert state.shape == (2,) and (state >= 0).all() and state[0] != state[1]


def test_guidance_of_zero_does_not_read_the_other_logits() -> None:
    logits = torch.randn(20, 9)
    plain, other = (
        sample_codes(logits, uncond_logits=uncond, generator=generator(0))
        for uncond in (None, torch.full((20, 9), torch.nan))
    )
    assert torch.equal(plain, other)


def test_bad_arguments() -> None:
    x = torch.zeros(2, 4)
    with pytest.raises(
        TypeError, match="logits: expected dtype float16 or bfloat16 or float32, found float64"
    ):
        sample_codes(x.double())
    with pytest.raises(TypeError, match=r"logits: expected a .* tensor, found list"):
        sample_codes([1.0])  # type: ignore[arg-type]
    for shape in ((), (3, 0)):
        with pytest.raises(
            ValueError, match=r"logits: expected shape \(\.\.\., V\) with V from 1 to 1048576"
        ):
            sample_codes(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"uncond_logits: expected shape \(2, 4\), found \(2, 3\)"):
        sample_codes(x, uncond_logits=x[:, 1:], guidance=1.0)
    with pytest.raises(
        ValueError, match=r"uncond_logits: expected a tensor where guidance is 1.0, found None"
    ):
        sample_codes(x, guidance=1.0)
    for name, values in {
        "guidance": (-0.1, math.inf, math.nan),
        "top_k": (-1,),
        "top_p": (-0.1, 1.1, math.nan),
        "temperature": (0.0, -1.0, math.inf, math.nan),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name}: expected .*, found {value}"):
                sample_codes(x, uncond_logits=x, **{name: value})  # type: ignore[arg-type]
    expected = {
        "guidance": "a finite number of at least 0",
        "top_k": f"an integer from 0 to {2**63 - 1}",
        "top_p": "a number from 0 to 1",
        "temperature": r"a number from 1e-30 to 1e\+30",
        "generator": "a torch.Generator or None",
    }
    types: dict[str, tuple[Any, ...]] = {
        "guidance": (None, "1"),
        "top_k": (None, "1", 2.0),
        "top_p": (None, "1"),
        "temperature": (None, "1"),
        "generator": (0, "cpu"),
    }
    for name, bad in types.items():
        for value in bad:
            with pytest.raises(TypeError, match=f"{name}: expected {expected[name]}, found {value!r}"):
                sample_codes(x, **{name: value})
    with pytest.raises(ValueError, match=f"top_k: expected {expected['top_k']}, found {10**30}"):
        sample_codes(x, top_k=10**30)
    with pytest.raises(ValueError, match=r"state: expected shape \(words=2\), found \(3,\)"):
        OP(x, None, torch.zeros(3, dtype=torch.int64), 0.0, 0, 0.0, 1.0, None)
    with pytest.raises(ValueError, match=r"settings: expected shape \(words=5\), found \(4,\)"):
        OP(x, None, None, 0.0, 0, 0.0, 1.0, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="settings: expected dtype int64, found float32"):
        OP(x, None, None, 0.0, 0, 0.0, 1.0, torch.zeros(5))


def test_compiled_calls_move_the_generator_on() -> None:
    def step(logits: Tensor, uncond: Tensor) -> Tensor:
        return sample_codes(logits.sin(), uncond_logits=uncond, guidance=1.0, top_k=5, top_p=0.9) + 1

    x, uncond = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = step(x, uncond)
    torch.manual_seed(1)
    assert torch.equal(compiled(x, uncond), expected)
    assert not torch.equal(compiled(x, uncond), expected)


def test_what_triton_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def reason(V: int) -> str | None:
        return refusal("sample_codes", "triton", torch.zeros(1, V), None, None, 0.0, 0, 0.0, 1.0, None)

    assert reason(4) == "needs CUDA or HIP tensors, found logits on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason(16385) == "needs V of at most 16384, found 16385"
    assert reason(16384) is None
