"""The Triton backend of `attention_prologue` on Triton's interpreter.

test_attention_prologue_triton.py runs this file.

Triton asks for its interpreter once, as kernels are defined: hence a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import attention_prologue
from tests.ops.test_attention_prologue import NAMES, OP, SIZES, STEPS, check, check_short_heads, problem


@pytest.fixture(scope="module", autouse=True)
def _backend() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: "+".join(sorted(steps)) or "nothing")
def test_equals_pytorch(steps: set[str]) -> None:
    for size in SIZES:
        check(problem(size, torch.float32, torch.float32, steps))


def test_dtypes() -> None:
    for dtype, cached in product(NAMES, NAMES):
        check(problem((2, 3, 3, 6, 1, 1), dtype, cached, STEPS[3]))


@pytest.mark.parametrize(
    "size", [(1, 2, 18, 34, 0, 1), (1, 2, 2, 600, 1, 0), (2, 2, 3, 1, 0, 0), (1, 2, 9, 7, 1, 1)]
)
def test_heads_in_several_programs_and_odd_sizes(size: tuple[int, int, int, int, int, int]) -> None:
    check(problem(size, torch.float32, torch.float32, STEPS[2] if size[3] % 2 else STEPS[3]))


def test_no_tokens() -> None:
    for size in [(2, 0, 2, 4, 1, 1), (0, 3, 2, 4, 0, 0)]:
        check(problem(size, torch.float32, torch.float32, STEPS[3]))


def test_strides() -> None:
    B, L, NH, D, before, after = size = SIZES[1]
    T = before + L + after
    for shape, axis in [((B, T, 2, NH, D), 2), ((B, T, NH, D, 2), 4)]:
        arguments = problem(size, torch.float32, torch.bfloat16, STEPS[3])
        caches = torch.full(shape, torch.nan, dtype=torch.bfloat16)
        arguments["k_cache"], arguments["v_cache"] = caches.unbind(axis)
        check(arguments)
    arguments = problem(size, torch.float32, torch.float32, STEPS[3])
    arguments["qkv"] = arguments["qkv"].mT.contiguous().mT
    arguments["rotary"] = arguments["rotary"].mT.contiguous().mT
    arguments["bias"] = torch.randn(3 * NH * D, 2, dtype=torch.bfloat16)[:, 0]
    arguments["q_scale"] = torch.randn(NH, 2)[:, 1]
    check(arguments)


@pytest.mark.parametrize("turned", ["k_cache", "v_cache"])
def test_caches_of_unequal_strides(turned: str) -> None:
    """With room behind each, so that a wrong stride makes wrong values and no crash."""
    arguments = problem(SIZES[1], torch.float32, torch.float32, STEPS[3])
    for name in ("k_cache", "v_cache"):
        strides = arguments[name].stride()
        strides = strides[::-1] if name == turned else strides
        arguments[name] = torch.full((2048,), torch.nan).as_strided(arguments[name].shape, strides)
    for one, other in zip(arguments["k_cache"].stride(), arguments["v_cache"].stride(), strict=True):
        assert one != other
    check(arguments)


def test_short_heads() -> None:
    check_short_heads()


def test_nan_stays_in_its_head() -> None:
    arguments = problem((1, 2, 2, 4, 0, 0), torch.float32, torch.float32, STEPS[3])
    arguments["qkv"][0, 0, [0, 8, 16]] = torch.nan  # in the first head of q, k and v
    q = attention_prologue(**arguments)
    for found in (q, arguments["k_cache"]):
        assert found[0, 0, 0].isnan().all()
        assert found[0, 0, 1].isfinite().all() and found[0, 1].isfinite().all()
    assert arguments["v_cache"].isnan().sum() == 1


def test_opcheck() -> None:
    given = problem(SIZES[1], torch.float32, torch.bfloat16, STEPS[3])
    given |= {name: torch.zeros_like(given[name]) for name in ("k_cache", "v_cache")}
    names = ("qkv", "k_cache", "v_cache", "start", "bias", "q_scale", "rotary")
    torch.library.opcheck(OP, tuple(given[name] for name in names))
