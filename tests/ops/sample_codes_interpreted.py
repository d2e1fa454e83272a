"""The Triton backend of `sample_codes` on Triton's interpreter; test_sample_codes_triton.py runs this file.

Triton asks for its interpreter once, as kernels are defined: hence a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import sample_codes
from tests.ops.test_sample_codes import (
    KINDS,
    OP,
    OPTIONS,
    check_at_most_keeps_no_more,
    check_the_second_word_counts,
    check_zeros_are_equal,
    generator,
    logits_of,
)


def check(logits: Tensor, seed: int = 0, **options: Any) -> None:
    found = {}
    for backend in ("triton", "reference"):
        with use_backend(backend):
            found[backend] = sample_codes(logits, generator=generator(seed), **options)
    assert torch.equal(found["triton"], found["reference"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and infinity
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_draws_the_same(kind: str, guidance: float) -> None:
    for rows, codes in [(3, 1), (4, 2), (4, 63), (3, 65), (3, 1000)]:
        logits, uncond = logits_of(kind, rows, codes), logits_of(kind, rows, codes)
        for seed, options in enumerate(OPTIONS):
            check(logits, seed, uncond_logits=uncond, guidance=guidance, **options)


@given(seed=st.integers(0, 2**31), codes=st.integers(1, 9), levels=st.integers(1, 5))
def test_draws_the_same_from_few_values(seed: int, codes: int, levels: int) -> None:
    random = generator(seed)
    logits = torch.randint(levels, (6, codes), generator=random).float() / 2
    top_k = int(torch.randint(2, codes + 3, (), generator=random))
    check(logits, seed, top_k=top_k, top_p=float(torch.randint(0, 17, (), generator=random)) / 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_and_strides(dtype: torch.dtype) -> None:
    logits, uncond = (torch.randn(2, 40, 6, dtype=dtype) for _ in range(2))
    for view, other in ((logits.mT, uncond.mT), (logits[:, ::2], uncond[:, ::2]), (logits[0, :, 0],) * 2):
        check(view, uncond_logits=other, guidance=0.7, top_k=9, top_p=0.9)


def test_the_shapes_of_a_model() -> None:
    check(torch.randn(4, 4096), top_k=900, top_p=0.96)
    check(torch.randn(2, 16384), top_p=0.9)
    check(torch.zeros(0, 5))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of a cast that masks cut off
def test_edges() -> None:
    with use_backend("triton"):
        check_zeros_are_equal()
        check_at_most_keeps_no_more()
        check_the_second_word_counts()


def test_opcheck() -> None:
    x = torch.randn(2, 3, 8)
    with use_backend("triton"):
        torch.library.opcheck(OP, (x, x.flip(2), torch.tensor([1, 2]), 1.5, 3, 0.9, 0.8))
