"""FlashAttention-3 as a backend: what it is called with, by a stand-in that computes the same in PyTorch."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import hitsr_fast.reference.scale_block_attention as reference
from hitsr_fast.dispatch import BackendUnavailableError, use_backend
from hitsr_fast.ops import scale_block_attention
from hitsr_fast.ops import scale_block_attention_flash as flash
from tests.ops.test_scale_block_attention import dense, qkv
from tests.tolerances import TOLERANCES

BLOCKS = [5, 1, 9, 2]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Of one image, (T, NH, D): out and lse (NH, T)."""
    scores = scale * torch.einsum("qhd,khd->hqk", q.float(), k.float())
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.float())
    return out.to(q.dtype), scores.logsumexp(-1)


class FlashAttention3(ModuleType):
    """What `flash_attn_interface` does with the arguments that the backend passes; it counts calls."""

    def __init__(self) -> None:
        super().__init__("flash_attn_interface")
        self.launches = 0

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor | int,
        softmax_scale: float,
        causal: bool,
        cache_batch_idx: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        max_seqlen_q: int | None = None,
        num_splits: int = 0,
        return_softmax_lse: bool = False,
    ) -> Any:
        self.launches += 1
        assert not causal
        assert k_cache.stride(-1) == v_cache.stride(-1) == 1
        if cu_seqlens_q is None:
            assert isinstance(cache_seqlens, int) and not return_softmax_lse
            pairs = zip(q, k_cache[:, :cache_seqlens], v_cache[:, :cache_seqlens], strict=True)
            return torch.stack([attend(*image, softmax_scale)[0] for image in pairs])
        assert isinstance(cache_seqlens, Tensor) and cache_batch_idx is not None
        assert cu_seqlens_q.dtype == cache_seqlens.dtype == cache_batch_idx.dtype == torch.int32
        assert len(cu_seqlens_q) - 1 == len(cache_seqlens) == len(cache_batch_idx)
        assert q.dim() == 3 and int(cu_seqlens_q.diff().max()) == max_seqlen_q
        out = torch.full(q.shape, torch.nan, dtype=q.dtype)
        lse = torch.full((q.shape[1], len(q)), torch.nan)
        edges = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cache_seqlens, cache_batch_idx, strict=True)
        for begin, end, length, image in edges:
            keys, values = k_cache[image, :length], v_cache[image, :length]
            out[begin:end], lse[:, begin:end] = attend(q[begin:end], keys, values, softmax_scale)
        return out, lse, torch.tensor([]), torch.tensor([])

    def _flash_attn_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens_q: None,
        cu_seqlens_k: None,
        seqused_q: None,
        seqused_k: None,
        max_seqlen_q: None,
        max_seqlen_k: None,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        softmax_scale: float,
        is_causal: bool,
        *,
        deterministic: bool,
    ) -> Tensor:
        self.launches += 1
        assert deterministic and not is_causal
        assert all(t.stride(-1) == 1 for t in (dout, q, k, v, out, dq, dk, dv))
        assert softmax_lse.is_contiguous() and softmax_lse.dtype == torch.float32
        dout, q, k, v, out = (t.float() for t in (dout, q, k, v, out))
        weights = (softmax_scale * torch.einsum("bqhd,bkhd->bhqk", q, k) - softmax_lse[..., None]).exp()
        delta = (dout * out).sum(-1).transpose(1, 2)
        scores = softmax_scale * weights * (torch.einsum("bqhd,bkhd->bhqk", dout, v) - delta[..., None])
        dq.copy_(torch.einsum("bhqk,bkhd->bqhd", scores, k))
        dk.copy_(torch.einsum("bhqk,bqhd->bkhd", scores, q))
        dv.copy_(torch.einsum("bhqk,bqhd->bkhd", weights, dout))
        return delta


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> FlashAttention3:
    stand_in = FlashAttention3()
    monkeypatch.setitem(sys.modules, "flash_attn_interface", stand_in)
    return stand_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_in_one_launch(module: FlashAttention3, dtype: torch.dtype) -> None:
    q, k, v = (t.mT.contiguous().mT for t in qkv(3, 17, 2, 8, dtype=dtype))
    out, lse = flash.scale_block_attention_flash(q, k, v, BLOCKS, 0.3)
    assert module.launches == 1
    assert out.is_contiguous() and lse.is_contiguous() and out.dtype == dtype
    tolerance = TOLERANCES["float32_reordered" if dtype == torch.float32 else "bfloat16"]._asdict()
    torch.testing.assert_close(out.double(), dense(q, k, v, BLOCKS, 0.3), **tolerance)
    expected = reference.scale_block_attention(q, k, v, BLOCKS, 0.3)[1]
    torch.testing.assert_close(lse, expected, **TOLERANCES["float32_reordered"]._asdict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_by_block(module: FlashAttention3, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 17, 2, 8, dtype=dtype)
    grad = torch.randn(2, 2, 8, 17, dtype=dtype).permute(0, 3, 1, 2)
    out, lse = reference.scale_block_attention(q, k, v, BLOCKS, 0.3)
    given = (grad, q, k, v, out, lse, BLOCKS, 0.3)
    found = flash.scale_block_attention_backward_flash(*given)
    assert module.launches == len(BLOCKS)
    tolerance = TOLERANCES["float32_reordered" if dtype == torch.float32 else "bfloat16"]._asdict()
    for actual, want in zip(found, reference.scale_block_attention_backward(*given), strict=True):
        assert actual.dtype == dtype and actual.is_contiguous()
        torch.testing.assert_close(actual, want, **tolerance)


def test_a_cache(module: FlashAttention3) -> None:
    q, k, v = qkv(2, 17, 2, 8, dtype=torch.float32)
    k[:, 11:], v[:, 11:] = torch.nan, torch.nan
    out = flash.cached_attention_flash(q[:, :3], k, v, 11, 0.3)
    expected = reference.cached_attention(q[:, :3], k, v, 11, 0.3)
    torch.testing.assert_close(out, expected, **TOLERANCES["float32_reordered"]._asdict())


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: None)
    assert flash.available() == "FlashAttention-3 (flash_attn_interface) is not installed"
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert flash.available() == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert flash.available() is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert flash.available() == "no CUDA device"


def test_calls_that_it_cannot_run() -> None:
    q = torch.zeros(1, 2, 3, 8, dtype=torch.float16)
    assert flash.supports(q) == "needs CUDA tensors, found cpu"
    with torch._subclasses.FakeTensorMode():
        q = torch.zeros(1, 2, 3, 8, dtype=torch.float16, device="cuda")
        assert flash.supports(q) is None
        assert flash.supports(q.float()) == "needs float16 or bfloat16, found float32"
        assert flash.supports(q[..., :4]) == "needs D of a multiple of 8 up to 256, found 4"
        assert flash.supports(q[:0]) == "needs tensors that hold values, found (0, 2, 3, 8)"


def test_forcing_it_is_refused_with_its_reason() -> None:
    q = torch.zeros(1, 2, 1, 8)
    with use_backend("flash_attn"), pytest.raises(BackendUnavailableError, match="flash_attn "):
        scale_block_attention(q, q, q, block_lengths=[2])
