"""`CachedBody` and its cache: what they refuse; test_var_body.py and test_hit_sampler.py have the values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.nn.cached_body import CachedBody, KVCache, linear_gelu
from hitsr_fast.ops import gated_residual
from tests.tolerances import TOLERANCES

LAYERS, B, L, HEADS, C = 3, 2, 4, 2, 8


def body() -> CachedBody:
    blocks = []
    for _ in range(LAYERS):
        attn, ffn = nn.Module(), nn.Module()
        attn.mat_qkv, attn.proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C)
        attn.q_bias, attn.v_bias = nn.Parameter(torch.randn(C)), nn.Parameter(torch.randn(C))
        ffn.fc1, ffn.fc2 = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        block = nn.Module()
        block.attn, block.ffn = attn, ffn
        blocks.append(block)
    return CachedBody(blocks, HEADS, 0.5, torch.float32)


def call(changed: dict[str, Any]) -> Tensor:
    stack = body()
    arguments = {"x": torch.randn(B, L, C), "modulation": torch.randn(LAYERS, 6, B, C), "start": 0}
    arguments |= {"cache": stack.new_cache(B, L)} | changed
    x, branch, gate = stack(**arguments)
    return gated_residual(x, branch, gate)


def cache_of(layers: int) -> KVCache:
    return KVCache(*torch.zeros(2, layers, B, L, HEADS, C // HEADS))


@torch.no_grad()
def test_bad_arguments() -> None:
    assert call({}).shape == (B, L, C)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"x": torch.zeros(L, C)}, r"x: expected shape \(B, L, C\), found \(4, 8\)"),
        (
            {"modulation": torch.zeros(LAYERS - 1, 6, B, C)},
            r"modulation: expected shape \(layers=3, 6=6, B=2, C=8\), found \(2, 6, 2, 8\)",
        ),
        (
            {"modulation": torch.zeros(LAYERS, 6, C)},
            r"modulation: expected shape \(layers=3, 6=6, B=2, C=8\), found \(3, 6, 8\)",
        ),
        (
            {"cache": cache_of(LAYERS + 1)},
            r"cache\.k: expected shape \(layers=3, B, T, NH, D\), found \(4, 2, 4, 2, 4\)",
        ),
    ]
    for changed, message in cases:
        with pytest.raises(ValueError, match=message):
            call(changed)


def test_the_first_sequences_of_a_cache() -> None:
    cache = cache_of(LAYERS)
    part = cache.first(1)
    assert part.k.shape == (LAYERS, 1, L, HEADS, C // HEADS)
    assert part.k.data_ptr() == cache.k.data_ptr() and part.v.data_ptr() == cache.v.data_ptr()
    for batch in (-1, B + 1):
        with pytest.raises(ValueError, match=f"batch: expected an integer from 0 to B = 2, found {batch}"):
            cache.first(batch)
    with pytest.raises(TypeError, match=r"batch: expected an integer from 0 to B = 2, found 1\.0"):
        cache.first(1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, "float64_reordered"),
        (torch.float32, "float32_reordered"),
        (torch.bfloat16, "bfloat16"),
        (torch.float16, "float16"),
    ],
)
def test_onednn_is_called_only_where_it_multiplies_the_dtype(
    dtype: torch.dtype, tolerance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU without products of half precision, in place of whichever runs the test."""

    def product(x: Tensor, weight: Tensor, bias: Tensor, *gelu: Any) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError("could not create a primitive descriptor")
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", product)
    for question in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, question, lambda: False)
    x, weight, bias = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in ((3, 8), (5, 8), (5,)))
    found = linear_gelu(x, weight, bias)
    assert found.dtype == dtype
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    torch.testing.assert_close(found, expected.to(dtype), **TOLERANCES[tolerance]._asdict())
