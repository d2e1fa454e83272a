"""`attention_prologue` on each backend against PyTorch's own steps, in float64; its contract."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.ops import attention_prologue
from hitsr_fast.ops.attention_prologue_triton import constants
from tests.ops.backends import INTERPRETED, fewer_when_interpreted, refusal, sizes
from tests.tolerances import TOLERANCES

NAMES = {torch.float32: "float32_reordered", torch.bfloat16: "bfloat16", torch.float16: "float16"}
Size = tuple[int, int, int, int, int, int]
# B, L, NH, D, rows before and after the block.
SMALL: list[Size] = [(1, 1, 1, 2, 0, 0), (2, 3, 5, 6, 1, 2), (3, 17, 2, 64, 4, 0), (2, 2, 3, 34, 0, 1)]
SIZES = {
    "any": SMALL,
    "gpu": [(1, 1, 1, 2, 0, 0), (2, 1024, 16, 64, 16, 0), (1, 70, 30, 72, 3, 1), (1, 7, 2, 1024, 0, 0)],
}
STEPS = [
    set(names) for names in ((), ("bias",), ("bias", "q_scale"), ("bias", "q_scale", "rotary"), ("rotary",))
]


def problem(size: Size, dtype: torch.dtype, cached: torch.dtype, steps: set[str]) -> dict[str, Any]:
    """Arguments of a call; the caches hold NaN."""
    B, L, NH, D, before, after = size
    angles = torch.rand(L, D // 2) * 6
    optional = {
        "bias": torch.randn(3 * NH * D),
        "q_scale": torch.rand(NH) * 3 + 1,
        "rotary": torch.stack([angles.cos(), angles.sin()], dim=-1),
    }
    caches = (torch.full((B, before + L + after, NH, D), torch.nan, dtype=cached) for _ in range(2))
    return {
        "qkv": torch.randn(B, L, 3 * NH * D).to(dtype),
        **dict(zip(("k_cache", "v_cache"), caches, strict=True)),
        "start": before,
        **{name: value for name, value in optional.items() if name in steps},
    }


def plain(
    qkv: Tensor,
    k_cache: Tensor,
    start: int,
    bias: Tensor | None = None,
    q_scale: Tensor | None = None,
    rotary: Tensor | None = None,
    **_rest: Any,
) -> list[Tensor]:
    """q, k and v by PyTorch's own steps, in float64; the rotation as a product of complex numbers."""
    values = qkv.double().contiguous() + (0 if bias is None else bias.double())
    q, k, v = values.unflatten(2, (3, *k_cache.shape[2:])).unbind(2)
    if q_scale is not None:
        q, k = F.normalize(q, dim=-1) * q_scale.double().view(1, 1, -1, 1), F.normalize(k, dim=-1)
    if rotary is not None:
        turn = torch.view_as_complex(rotary.double().contiguous())[:, None]
        q, k = (
            torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
            for x in (q, k)
        )
    return [q, k, v]


def check(arguments: dict[str, Any]) -> None:
    """A call against PyTorch's steps, and no row of the caches but those of the block is touched."""
    expected = plain(**arguments)
    caches = [arguments["k_cache"], arguments["v_cache"]]
    start, end = arguments["start"], arguments["start"] + arguments["qkv"].shape[1]
    q = attention_prologue(**arguments)
    assert q.dtype == arguments["qkv"].dtype and q.is_contiguous()
    for cache in caches:
        assert cache[:, :start].isnan().all() and cache[:, end:].isnan().all()
    for found, want in zip((q, *(cache[:, start:end] for cache in caches)), expected, strict=True):
        torch.testing.assert_close(found.double(), want, **TOLERANCES[NAMES[found.dtype]]._asdict())


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Value by value; NaN is NaN."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert ((found == expected) | (found.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: "+".join(sorted(steps)) or "nothing")
def test_equals_pytorch(backend: str, steps: set[str]) -> None:
    for size, dtype, cached in product(sizes(backend, SIZES), NAMES, NAMES):
        # The interpreter is slow: each pair of dtypes at one size.
        if not INTERPRETED or size == SMALL[1] or dtype == cached == torch.float32:
            check(problem(size, dtype, cached, steps))


@pytest.mark.parametrize(
    "size", [(1, 2, 18, 34, 0, 1), (1, 2, 2, 600, 1, 0), (2, 2, 3, 1, 0, 0), (1, 2, 9, 7, 1, 1)]
)
def test_heads_in_several_programs_and_odd_sizes(backend: str, size: Size) -> None:
    check(problem(size, torch.float32, torch.float32, STEPS[2] if size[3] % 2 else STEPS[3]))


def test_no_tokens(backend: str) -> None:
    for size in [(2, 0, 2, 4, 1, 1), (0, 3, 2, 4, 0, 0)]:
        check(problem(size, torch.float32, torch.float32, STEPS[3]))


@fewer_when_interpreted
@given(
    size=st.tuples(*(st.integers(*limits) for limits in ((0, 2), (0, 20), (1, 4), (1, 40), (0, 2), (0, 2)))),
    steps=st.sampled_from(STEPS),
)
def test_any_size(backend: str, size: Size, steps: set[str]) -> None:
    steps = steps - {"rotary"} if size[3] % 2 else steps
    check(problem(size, torch.float32, torch.float32, steps))


@pytest.mark.backends("reference")
def test_float64(backend: str) -> None:
    arguments = problem((2, 3, 2, 6, 1, 1), torch.float64, torch.float64, STEPS[3])
    expected, q = plain(**arguments), attention_prologue(**arguments)
    found = (q, arguments["k_cache"][:, 1:4], arguments["v_cache"][:, 1:4])
    for actual, want in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, want, **TOLERANCES["float64_reordered"]._asdict())


@pytest.mark.backends("reference", "cpu")
@pytest.mark.parametrize("bits", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_read(backend: str, bits: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(bits)
    caches = torch.zeros(2, 1, 2**16 // 8, 1, 8)
    q = attention_prologue(values.view(1, -1, 1, 8).expand(1, -1, 3, 8).flatten(2), caches[0], caches[1], 0)
    for found in (q.float(), *caches):
        assert_same(found.flatten(), values.float())


@pytest.mark.backends("reference", "cpu")  # Triton's interpreter cuts bfloat16 off
@pytest.mark.parametrize("bits", [torch.float16, torch.bfloat16])
def test_16_bit_values_are_rounded_to_the_nearest(backend: str, bits: torch.dtype) -> None:
    """Every one, halfway to the next, and a float32 on either side of that; NaN and infinity."""
    below = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(bits).float()
    below = below[below.isfinite()]
    step = torch.nextafter(below.to(bits), torch.tensor(torch.inf, dtype=bits)).float() - below
    halfway = below + (step / 2).nan_to_num(posinf=0)
    near = [torch.nextafter(halfway, torch.tensor(limit)) for limit in (-torch.inf, torch.inf)]
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 65519.0, 65520.0, 3.4e38, 1e-30, -1e-45])
    values = torch.cat([below, halfway, *near, special])
    values = values[: len(values) // 8 * 8]
    caches = torch.zeros(2, 1, len(values) // 8, 1, 8, dtype=bits)
    qkv = values.view(1, -1, 1, 8).expand(1, -1, 3, 8).flatten(2)
    attention_prologue(qkv, caches[0], caches[1], 0)
    for found in caches:
        assert_same(found.flatten(), values.to(bits))


@pytest.mark.parametrize("dtype", NAMES)
def test_strides(backend: str, dtype: torch.dtype) -> None:
    """As a model has them: both caches of all layers in one tensor, or the values of a token side by side."""
    B, L, NH, D, before, after = size = SMALL[1]
    T = before + L + after
    for shape, axis in [
        ((2, B, T, NH, D), 0),
        ((B, 2, T, NH, D), 1),
        ((B, T, 2, NH, D), 2),
        ((B, T, NH, 2, D), 3),
        *([((B, T, NH, D, 2), 4)] if backend == "triton" else []),  # the CPU's leaves it to the reference
    ]:
        arguments = problem(size, dtype, dtype, STEPS[3])
        arguments["k_cache"], arguments["v_cache"] = torch.full(shape, torch.nan, dtype=dtype).unbind(axis)
        check(arguments)
    arguments = problem(size, dtype, dtype, STEPS[3])
    arguments["qkv"] = arguments["qkv"].mT.contiguous().mT
    arguments["rotary"] = arguments["rotary"].mT.contiguous().mT
    arguments["bias"] = torch.randn(3 * NH * D, 2, dtype=dtype)[:, 0]
    arguments["q_scale"] = torch.randn(NH, 2)[:, 1]
    check(arguments)


@pytest.mark.parametrize("turned", ["k_cache", "v_cache"])
@pytest.mark.backends("reference", "triton")
def test_caches_of_unequal_strides(backend: str, turned: str) -> None:
    """With room behind each, so that a wrong stride makes wrong values and no crash."""
    arguments = problem(SMALL[1], torch.float32, torch.float32, STEPS[3])
    for name in ("k_cache", "v_cache"):
        strides = arguments[name].stride()
        strides = strides[::-1] if name == turned else strides
        arguments[name] = torch.full((2048,), torch.nan).as_strided(arguments[name].shape, strides)
    for one, other in zip(arguments["k_cache"].stride(), arguments["v_cache"].stride(), strict=True):
        assert one != other
    check(arguments)


def test_the_cpu_leaves_a_stride_over_channels_to_the_reference() -> None:
    arguments = problem((2, 3, 2, 4, 0, 1), torch.float32, torch.float32, STEPS[3])
    arguments["v_cache"] = arguments["v_cache"].mT.contiguous().mT
    reason = refusal("attention_prologue", "cpu", *arguments.values())
    assert reason == "needs caches with a stride of 1 over D, found 2"
    check(arguments)


def test_q_is_no_part_of_qkv(backend: str) -> None:
    qkv, caches = torch.randn(1, 1, 6), torch.zeros(2, 1, 1, 1, 2)
    q = attention_prologue(qkv, caches[0], caches[1], 0)
    q.zero_()
    assert qkv.all()


def test_short_heads(backend: str) -> None:
    """Zeros stay zeros, and a length below 1e-12 counts as that."""
    qkv = torch.cat([torch.zeros(6), torch.tensor([3e-13, 4e-13] * 3)]).view(1, 2, 6)
    caches = torch.zeros(2, 1, 2, 1, 2)
    q = attention_prologue(qkv, caches[0], caches[1], 0, q_scale=torch.tensor([2.0]))
    expected = torch.tensor([[0.0, 0.0], [0.3, 0.4]])
    for found, want in ((caches[0], expected), (q, 2 * expected)):
        torch.testing.assert_close(found.view(2, 2), want, **TOLERANCES["float32_reordered"]._asdict())


def test_a_bad_head_disturbs_no_other(backend: str) -> None:
    arguments = problem((1, 2, 2, 4, 0, 0), torch.float32, torch.float32, STEPS[3])
    arguments["qkv"][0, 0, [0, 8, 16]] = torch.nan  # in the first head of q, k and v
    q = attention_prologue(**arguments)
    for found in (q, arguments["k_cache"]):
        assert (
            found[0, 0, 0].isnan().all() and found[0, 0, 1].isfinite().all() and found[0, 1].isfinite().all()
        )
    assert arguments["v_cache"].isnan().sum() == 1


def test_autograd_learns_that_it_wrote(backend: str) -> None:
    arguments = problem((1, 2, 1, 2, 0, 0), torch.float32, torch.float32, set())
    for name in ("k_cache", "v_cache"):
        factor = torch.ones(1, 2, 1, 2, requires_grad=True)
        loss = (factor * arguments[name]).sum()
        with torch.no_grad():
            attention_prologue(**arguments)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def bad(**changed: Any) -> dict[str, Any]:
    return problem((2, 3, 2, 4, 1, 1), torch.float32, torch.float32, STEPS[3]) | changed


def test_bad_arguments() -> None:
    cache, wide = torch.zeros(2, 5, 2, 4), torch.zeros(2, 5, 2, 5)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (
            {"qkv": [1.0]},
            TypeError,
            "qkv: expected a float16 or bfloat16 or float32 or float64 tensor, found list",
        ),
        ({"qkv": torch.zeros(2, 3, 24).int()}, TypeError, "qkv: expected dtype .*, found int32"),
        ({"qkv": torch.zeros(2, 24)}, ValueError, r"qkv: expected shape \(B, L, 3\*NH\*D\), found \(2, 24\)"),
        (
            {"qkv": torch.zeros(2, 3, 25)},
            ValueError,
            r"qkv: expected shape \(B=2, L, 3\*NH\*D=24\), found \(2, 3, 25\)",
        ),
        ({"k_cache": cache.long()}, TypeError, "k_cache: expected dtype .*, found int64"),
        (
            {"k_cache": cache[:1]},
            ValueError,
            r"k_cache: expected shape \(B=2, Tmax, NH, D\), found \(1, 5, 2, 4\)",
        ),
        (
            {"k_cache": cache[0]},
            ValueError,
            r"k_cache: expected shape \(B=2, Tmax, NH, D\), found \(5, 2, 4\)",
        ),
        ({"k_cache": cache.to("meta")}, ValueError, "k_cache: expected device cpu, found meta"),
        ({"v_cache": cache.half()}, TypeError, "v_cache: expected dtype float32, found float16"),
        (
            {"v_cache": cache[:, 1:]},
            ValueError,
            r"v_cache: expected shape \(B=2, Tmax=5, NH=2, D=4\), found \(2, 4, 2, 4\)",
        ),
        ({"start": -1}, ValueError, "start: expected an integer from 0 to Tmax - L = 2, found -1"),
        ({"start": 3}, ValueError, "start: expected an integer from 0 to Tmax - L = 2, found 3"),
        *(
            (
                {"start": start},
                TypeError,
                f"start: expected an integer from 0 to Tmax - L = 2, found {start!r}",
            )
            for start in (1.0, None, "1")
        ),
        (
            {"k_cache": cache[:, :2], "v_cache": cache[:, :2].clone()},
            ValueError,
            "qkv: expected L of at most Tmax = 2, found 3",
        ),
        ({"bias": torch.zeros(24).int()}, TypeError, "bias: expected dtype .*, found int32"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias: expected shape \(3\*NH\*D=24\), found \(8,\)"),
        ({"q_scale": torch.ones(2).half()}, TypeError, "q_scale: expected dtype float32, found float16"),
        ({"q_scale": torch.ones(1, 2)}, ValueError, r"q_scale: expected shape \(NH=2\), found \(1, 2\)"),
        (
            {"rotary": torch.ones(3, 2, 2).double()},
            TypeError,
            "rotary: expected dtype float32, found float64",
        ),
        (
            {"rotary": torch.ones(3, 4)},
            ValueError,
            r"rotary: expected shape \(L=3, D/2=2, 2=2\), found \(3, 4\)",
        ),
        (
            {"qkv": torch.zeros(2, 3, 30), "k_cache": wide, "v_cache": wide.clone(), "bias": None},
            ValueError,
            "rotary: expected caches of an even D, found 5",
        ),
        (
            {"k_cache": cache[:1].expand(2, 5, 2, 4)},
            ValueError,
            "k_cache: expected memory for each element, found an expanded tensor",
        ),
        (
            {"v_cache": cache[:, :1].expand(2, 5, 2, 4)},
            ValueError,
            "v_cache: expected memory for each element, found an expanded tensor",
        ),
    ]
    for changed, error, message in cases:
        with pytest.raises(error, match=message):
            attention_prologue(**bad(**changed))


def test_shared_memory() -> None:
    both = torch.zeros(2, 6, 2, 4)
    cases = [
        (both[:, :5], both[:, :5], "k_cache: .* that v_cache shares"),
        (both[:, :5], both[:, 1:], "k_cache: .* that v_cache shares"),
        (both[:, 1:], both[:, :5], "k_cache: .* that v_cache shares"),
    ]
    for k_cache, v_cache, message in cases:
        with pytest.raises(ValueError, match=message):
            attention_prologue(**bad(k_cache=k_cache, v_cache=v_cache))
    room = torch.zeros(1000)
    caches = room[: 2 * 80].view(2, 2, 5, 2, 4)
    for at, name in [(20, "k_cache"), (159 - 1, "v_cache")]:
        qkv = room[at : at + 144].view(2, 3, 24)
        with pytest.raises(
            ValueError, match=f"{name}: expected memory of its own, found some that qkv shares"
        ):
            attention_prologue(**bad(qkv=qkv, k_cache=caches[0], v_cache=caches[1]))
    attention_prologue(**bad(qkv=room[160:304].view(2, 3, 24), k_cache=caches[0], v_cache=caches[1]))
    for name, shape in (("bias", (24,)), ("q_scale", (2,)), ("rotary", (3, 2, 2))):
        size = math.prod(shape)
        for at, cache in ((79, "k_cache"), (159, "v_cache")):
            shared = {name: room[at + 1 - size : at + 1].view(shape)}
            with pytest.raises(
                ValueError, match=f"{cache}: expected memory of its own, found some that {name} shares"
            ):
                attention_prologue(**bad(k_cache=caches[0], v_cache=caches[1], **shared))
        apart = {name: room[160 : 160 + size].view(shape)}
        attention_prologue(**bad(k_cache=caches[0], v_cache=caches[1], **apart))


def test_what_is_only_read_may_be_shared(backend: str) -> None:
    weights = torch.rand(24)
    arguments = bad(bias=weights, q_scale=weights[:2], rotary=weights[:12].view(3, 2, 2))
    check(arguments)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    gaps=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    offset=st.integers(-60, 60),
)
def test_shared_memory_is_found_exactly(sizes: list[int], order: Any, gaps: list[int], offset: int) -> None:
    """Two tensors of the same strides share memory if and only if writing one changes the other."""
    from hitsr_fast.checks import check_apart

    strides, reach = [], 1
    for size, gap in zip(sizes, gaps, strict=False):
        strides.append(reach + gap)
        reach = strides[-1] * size
    axes = list(zip(sizes, strides, strict=True))
    order.shuffle(axes)
    shape, stride = zip(*axes, strict=True)
    room = torch.zeros(2 * reach + 200)
    one, other = (torch.as_strided(room, shape, stride, place) for place in (80, 80 + offset))
    one.fill_(1)
    if other.any():
        with pytest.raises(ValueError, match="one: expected memory of its own, found some that other shares"):
            check_apart({"one": one}, {"other": other})
    else:
        check_apart({"one": one}, {"other": other})


def test_compiles_for_any_start() -> None:
    def block(
        qkv: Tensor, caches: Tensor, start: int, bias: Tensor, q_scale: Tensor, rotary: Tensor
    ) -> Tensor:
        k_cache, v_cache = caches.unbind(0)
        q = attention_prologue(qkv.tanh(), k_cache, v_cache, start, bias=bias, q_scale=q_scale, rotary=rotary)
        return q + k_cache[:, start : start + q.shape[1]]

    compiled: Any = torch.compile(block, fullgraph=True, backend="aot_eager")
    rest = [problem(SMALL[1], torch.float32, torch.float32, STEPS[3])[name] for name in sorted(STEPS[3])]
    caches = torch.zeros(2, 2, 9, 5, 6)
    copies = caches.clone()
    for start in (0, 3, 6):
        qkv = torch.randn(2, 3, 90)
        assert torch.equal(compiled(qkv, caches, start, *rest), block(qkv, copies, start, *rest))
        assert torch.equal(caches, copies)


def test_what_triton_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(B: int = 1, NH: int = 1, D: int = 2) -> str | None:
        cache = torch.empty(1).expand(B, 1, NH, D)
        return refusal(
            "attention_prologue", "triton", torch.zeros(B, 1, 1), cache, cache, 0, None, None, None
        )

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert reason() == "needs CUDA or HIP tensors, found qkv on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason() is None
    assert reason(D=1026) == "needs D of at most 1024, found 1026"
    assert reason(B=65536) == "needs B of at most 65535, found 65536"
    assert reason(NH=65536) == "needs NH of at most 65535, found 65536"


def test_blocks_hold_all_heads() -> None:
    for heads, head_dim in product((1, 2, 3, 16, 30), (1, 2, 64, 72, 128, 1000)):
        found = constants(heads, head_dim)
        assert found["BLOCK"] >= max(head_dim, 2) and found["HEADS"] <= 2 * heads
        assert found["HEADS"] * found["BLOCK"] <= max(512, found["BLOCK"])
