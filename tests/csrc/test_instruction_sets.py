"""Instruction sets of the CPU backends: each runs when asked for; an op lacking one takes the next lower."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hitsr_fast import extension
from tests.ops.backends import require
from tests.ops.test_backends import WITHOUT_EXTENSION
from tests.tolerances import TOLERANCES

OPS = torch.ops.hitsr_fast
SETS = ["portable"] if extension.unavailable() else OPS._instruction_sets()
DESCENDING = ["amx_bf16", "avx512_bf16", "avx512", "avx2", "portable"]
VECTORS = ["avx512", "avx2", "portable"]
OWN = {
    "attention_prologue": VECTORS,
    "group_norm_silu": VECTORS,
    "modulated_layer_norm": VECTORS,
    "nearest_code": DESCENDING,
    "preference_cross_entropy": VECTORS,
    "residual_decode_backward": VECTORS,
    "residual_quantize": VECTORS,
    "sample_codes": VECTORS,
    "scale_block_attention": ["amx_bf16", *VECTORS],
}


@pytest.fixture(autouse=True)
def _extension() -> None:
    require("cpu")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def attention_prologue(isa: str) -> tuple[Tensor, ...]:
    keys, values = torch.zeros(2, 8, 2, 16), torch.zeros(2, 8, 2, 16)
    q = OPS._attention_prologue(
        normal(2, 5, 96), keys, values, 1, normal(96), normal(2), normal(5, 8, 2), isa
    )
    return q, keys, values


def group_norm_silu(isa: str) -> tuple[Tensor, ...]:
    """With its gradients."""
    x, weight = normal(2, 24, 5, 7), normal(24)
    out, *moments = OPS._group_norm_silu(x, weight, weight, 4, 1e-6, isa)
    grads = OPS._group_norm_silu_backward(out, x, weight, weight, *moments, isa)
    return out, *moments, *grads


def nearest_code(isa: str) -> tuple[Tensor, ...]:
    parts = OPS._nearest_code_pack(normal(1, 300, 24), False, isa)
    return (OPS._nearest_code_search(normal(1, 1, 5, 9, 24), parts, 300, False, isa),)


def preference_cross_entropy(isa: str) -> tuple[Tensor, ...]:
    """With the gradients of the losses' sum."""
    target = torch.arange(50)
    weight, bias = normal(70, 40) / 6, normal(70)
    return tuple(
        OPS._preference_cross_entropy(normal(50, 40), weight, bias, target, target % 7, 0.1, True, isa)
    )


def residual_quantize(isa: str) -> tuple[Tensor, ...]:
    codes, phi, bias = normal(300, 24), normal(1, 24, 24, 3, 3) / 20, normal(1, 24)
    parts = OPS._nearest_code_pack(codes[None], False, isa)
    scales, index = [1, 1, 4, 5], [0, 0]
    z = normal(2, 24, 4, 5)
    return tuple(
        OPS._residual_quantize(z, codes, phi, bias, parts, scales, index, 0.5, None, False, True, True, isa)
    )


def residual_decode_backward(isa: str) -> tuple[Tensor, ...]:
    codes, phi = normal(30, 24), normal(2, 24, 24, 3, 3) / 20
    maps, scales, index = normal(2, 2, 24, 4, 5), [2, 3, 4, 5], [0, 1]
    indices = torch.arange(2 * 26).view(2, 26) % 30
    return tuple(OPS._residual_decode_backward(maps[0], maps, indices, codes, phi, scales, index, 0.5, isa))


def sample_codes(isa: str) -> tuple[Tensor, ...]:
    state = torch.tensor([3, 4])
    return (OPS._sample_codes(normal(7, 500), normal(7, 500) / 2, state, 2.5, 1.5, 1.4, 50, 0, isa),)


def scale_block_attention(isa: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    q, k, v = (normal(2, 9, 2, side, dtype=dtype)[..., :16] for side in (16, 17, 18))
    return tuple(OPS._scale_block_attention(q, k, v, [1, 8], 0.25, isa))


CALLS: dict[str, Callable[[str], tuple[Tensor, ...]]] = {
    "attention_prologue": attention_prologue,
    "group_norm_silu": group_norm_silu,
    "modulated_layer_norm": lambda isa: OPS._modulated_layer_norm(
        normal(2, 5, 40), normal(2, 40), normal(2, 40), 1e-6, torch.float32, isa
    ),
    "nearest_code": nearest_code,
    "preference_cross_entropy": preference_cross_entropy,
    "residual_decode_backward": residual_decode_backward,
    "residual_quantize": residual_quantize,
    "sample_codes": sample_codes,
    "scale_block_attention": scale_block_attention,
}


@pytest.mark.parametrize(("required", "status"), [("", 0), ("cpu", 1)])
def test_a_missing_extension_is_a_skip_or_a_failure_where_it_is_required(required: str, status: int) -> None:
    command = [sys.executable, "-c", WITHOUT_EXTENSION, "-q", "-rs", "-p", "no:cacheprovider", __file__]
    command += ["-k", "modulated_layer_norm-portable or listed_quickest_first"]
    environment = os.environ | {"HITSR_TEST_REQUIRE": required}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout
    assert ("3 errors" if status else "3 skipped") in done.stdout and "cpu: not built" in done.stdout


def test_sets_are_listed_quickest_first() -> None:
    assert SETS[-1] == "portable"
    assert set(SETS) <= set(DESCENDING)
    vectors = [name for name in SETS if name in VECTORS]
    assert vectors == [name for name in VECTORS if name in SETS]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have portable code alone")
def test_each_op_says_what_it_has_code_for() -> None:
    rows = dict(row.split(": ") for row in OPS._kernel_sets())
    assert {op: sets.split(", ") for op, sets in rows.items()} == OWN
    assert CALLS.keys() == OWN.keys()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("op", CALLS)
def test_each_set_computes_what_portable_code_does(op: str, isa: str) -> None:
    for found, expected in zip(CALLS[op](isa), CALLS[op]("portable"), strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCES["float32_reordered"]._asdict())


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("op", CALLS)
def test_an_op_takes_the_next_lower_set_that_it_has(op: str, isa: str) -> None:
    lower = next(name for name in DESCENDING[DESCENDING.index(isa) :] if name in OWN[op])
    for found, expected in zip(CALLS[op](isa), CALLS[op](lower), strict=True):
        assert torch.equal(found, expected)


def test_sets_of_one_op_differ() -> None:
    """Sums of other vectors round otherwise: no set's code stands in for another's unseen."""
    own = [isa for isa in SETS if isa in VECTORS]
    norms = [CALLS["modulated_layer_norm"](isa)[0] for isa in own]
    assert not any(torch.equal(*pair) for pair in itertools.pairwise(norms))


@pytest.mark.skipif("amx_bf16" not in SETS, reason="no AMX here")
def test_tiles_are_for_bfloat16_alone() -> None:
    for dtype, equal in ((torch.float32, True), (torch.bfloat16, False)):
        tiles, vectors = (scale_block_attention(isa, dtype)[1] for isa in ("amx_bf16", "avx512"))
        assert torch.equal(tiles, vectors) == equal


@pytest.mark.parametrize("op", CALLS)
def test_a_set_that_the_machine_lacks_is_refused(op: str) -> None:
    with pytest.raises(ValueError, match=f"isa: expected one of {', '.join(SETS)}, found neon"):
        CALLS[op]("neon")
