"""FlashAttention 2, 3 and 4 as a backend, by stand-ins with their signatures that compute in PyTorch."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor

import hitsr_fast.reference.scale_block_attention as reference
from hitsr_fast import backends, extension
from hitsr_fast.backends import FLASH_VERSIONS, Flash
from hitsr_fast.dispatch import BackendUnavailableError, use_backend
from hitsr_fast.ops import cached_attention, scale_block_attention
from tests.tolerances import TOLERANCES

op = importlib.import_module("hitsr_fast.ops.scale_block_attention")  # its name there is the function's

BLOCKS = [5, 1, 9, 2]
VERSIONS = {version.number: version for version in FLASH_VERSIONS}
NAMES = {torch.float32: "float32_reordered", torch.bfloat16: "bfloat16", torch.float16: "float16"}
DTYPES = tuple(NAMES)


class StandIn(ModuleType):
    """What the versions share; `calls` holds the numbers of queries and of keys of each."""

    module: ClassVar[str]

    def __init__(self) -> None:
        super().__init__(self.module)
        self.calls: list[tuple[int, int]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(B, T, NH, D) and lse (B, NH, T)."""
        self.check(q, k, v)
        self.calls.append((q.shape[1], k.shape[1]))
        scores = scale * torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float())
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.float())
        return out.to(q.dtype), scores.logsumexp(-1)

    def differentiate(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> list[Tensor]:
        self.check(dout, q, k, v, out)
        self.calls.append((q.shape[1], k.shape[1]))
        assert lse.is_contiguous() and lse.dtype == torch.float32
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        wide = (dout.float(), q.float(), k.float(), v.float(), out.float())
        grads = reference_gradients(*wide, lse, scale)
        return [grad.to(q.dtype) for grad in grads]

    @staticmethod
    def check(*tensors: Tensor) -> None:
        for tensor in tensors:
            assert tensor.dtype == tensors[0].dtype and tensor.numel() > 0
            assert tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0
            assert not any(stride % 8 for stride in tensor.stride()[:-1])


def reference_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    weights = (scale * torch.einsum("bqhd,bkhd->bhqk", q, k) - lse[..., None]).exp()
    delta = (dout * out).sum(-1).transpose(1, 2)
    scores = scale * weights * (torch.einsum("bqhd,bkhd->bhqk", dout, v) - delta[..., None])
    return (
        torch.einsum("bhqk,bkhd->bqhd", scores, k),
        torch.einsum("bhqk,bqhd->bkhd", scores, q),
        torch.einsum("bhqk,bqhd->bkhd", weights, dout),
    )


class FlashAttention2(StandIn):
    """flash_attn/flash_attn_interface.py of 2.7 and 2.8."""

    module = "flash_attn.flash_attn_interface"

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:
        assert (dropout_p, causal, window_size, softcap, alibi_slopes) == (0.0, False, (-1, -1), 0.0, None)
        assert softmax_scale is not None
        out, lse = self.attend(q, k, v, softmax_scale)
        return (out, lse, torch.empty(0, dtype=q.dtype)) if return_attn_probs else out

    def _flash_attn_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> Tensor:
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        assert alibi_slopes is None and deterministic and rng_state is None
        return write((dq, dk, dv), self.differentiate(dout, q, k, v, out, softmax_lse, softmax_scale))


class FlashAttention3(StandIn):
    """hopper/flash_attn_interface.py."""

    module = "flash_attn_interface"

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        qv: Tensor | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        cache_seqlens: Tensor | int | None = None,
        cache_batch_idx: Tensor | None = None,
        cache_leftpad: Tensor | None = None,
        page_table: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k_new: Tensor | None = None,
        max_seqlen_q: int | None = None,
        rotary_seqlens: Tensor | None = None,
        q_descale: Tensor | None = None,
        k_descale: Tensor | None = None,
        v_descale: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        attention_chunk: int = 0,
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        scheduler_metadata: Tensor | None = None,
        num_splits: int = 0,
        pack_gqa: bool | None = None,
        sm_margin: int = 0,
        return_softmax_lse: bool = False,
    ) -> Any:
        assert k is None and v is None and not causal and window_size == (-1, -1)
        assert softmax_scale is not None
        if cu_seqlens_q is None:
            assert cache_seqlens is None
            out, lse = self.attend(q, k_cache, v_cache, softmax_scale)
        else:
            assert isinstance(cache_seqlens, Tensor) and cache_batch_idx is not None
            assert cu_seqlens_q.dtype == cache_seqlens.dtype == cache_batch_idx.dtype == torch.int32
            assert len(cu_seqlens_q) - 1 == len(cache_seqlens) == len(cache_batch_idx)
            assert q.dim() == 3 and int(cu_seqlens_q.diff().max()) == max_seqlen_q
            out = torch.full(q.shape, torch.nan, dtype=q.dtype)
            lse = torch.full((q.shape[1], len(q)), torch.nan)
            edges = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cache_seqlens, cache_batch_idx, strict=True)
            for begin, end, length, image in edges:
                cache = k_cache[image, None, :length], v_cache[image, None, :length]
                (out[begin:end],), (lse[:, begin:end],) = self.attend(
                    q[None, begin:end], *cache, softmax_scale
                )
            self.calls = [(len(q), k_cache.shape[1])]
        return (out, lse, torch.tensor([]), torch.tensor([])) if return_softmax_lse else out

    def _flash_attn_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        sequed_q: Tensor | None = None,
        sequed_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
        softmax_scale: float | None = None,
        is_causal: bool = False,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        deterministic: bool = False,
        sm_margin: int = 0,
    ) -> Tensor:
        assert (cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k) == (None,) * 6
        assert softmax_scale is not None and deterministic
        assert (is_causal, window_size_left, window_size_right, softcap) == (False, -1, -1, 0.0)
        return write((dq, dk, dv), self.differentiate(dout, q, k, v, out, softmax_lse, softmax_scale))


class FlashAttention4(StandIn):
    """flash_attn/cute/interface.py of 4.0.0b36."""

    module = "flash_attn.cute.interface"

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        gather_kv_indices: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
        learnable_sink: Tensor | None = None,
        softcap: float = 0.0,
        num_splits: int = 1,
        pack_gqa: bool | None = None,
        deterministic: bool = False,
        score_mod: Callable[..., Any] | None = None,
        score_mod_bwd: Callable[..., Any] | None = None,
        mask_mod: Callable[..., Any] | None = None,
        aux_tensors: list[Tensor] | None = None,
        aux_scalars: tuple[Any, ...] | None = None,
        block_sparse_tensors: Any = None,
        block_sparse_tensors_bwd: Any = None,
        return_lse: bool = False,
        gather_bwd_recompute_p: bool = False,
        gather_bwd_token_chunk: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        assert qv is None and gather_kv_indices is None and learnable_sink is None and mask_mod is None
        assert softmax_scale is not None
        assert (causal, window_size, softcap) == (False, (None, None), 0.0)
        out, lse = self.attend(q, k, v, softmax_scale)
        return out, lse if return_lse else None

    def _flash_attn_bwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float = 0.0,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        *,
        deterministic: bool = False,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        assert (causal, softcap, window_size_left, window_size_right) == (False, 0.0, None, None)
        assert softmax_scale is not None and deterministic and dq is dk is dv is None
        return tuple(self.differentiate(dout, q, k, v, out, lse, softmax_scale))


def write(places: tuple[Tensor | None, ...], grads: list[Tensor]) -> Tensor:
    """As the versions do that are given where gradients go; they return a scratch tensor."""
    for place, grad in zip(places, grads, strict=True):
        assert place is not None and place.is_contiguous() and place.dtype == grad.dtype
        place.copy_(grad)
    return torch.empty(0)


STAND_INS: dict[int, type[StandIn]] = {2: FlashAttention2, 3: FlashAttention3, 4: FlashAttention4}


def install(patch: pytest.MonkeyPatch, *numbers: int) -> dict[int, StandIn]:
    """These versions, and no other, are installed."""
    found = {number: STAND_INS[number]() for number in numbers}
    for number, stand_in in STAND_INS.items():
        patch.setitem(sys.modules, stand_in.module, found.get(number))
    return found


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> Iterator[None]:
    backends._flash_reasons.cache_clear()
    yield
    backends._flash_reasons.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretends that CPU tensors are on a GPU of a compute capability."""

    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(Flash, "_misplaced", lambda self, tensor: None)

    return pretend


def qkv(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for _ in range(3)]


@pytest.fixture(params=VERSIONS)
def number(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def stand_in(number: int, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return install(monkeypatch, number)[number]


def ends(blocks: list[int]) -> list[int]:
    return torch.tensor(blocks).cumsum(0).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [BLOCKS, [17]], ids=str)
def test_forward(number: int, stand_in: StandIn, dtype: torch.dtype, blocks: list[int]) -> None:
    q, k, v = (t.mT.contiguous().mT for t in qkv(3, 17, 2, 8, dtype=dtype))
    out, lse = op._attention_flash(VERSIONS[number], q, k, v, blocks, 0.3)
    per_block = list(zip(blocks, ends(blocks), strict=True))
    assert stand_in.calls == (per_block if number != 3 else [(3 * 17, 17)])
    assert out.is_contiguous() and lse.is_contiguous() and out.dtype == dtype
    expected, expected_lse = reference.scale_block_attention(q.double(), k.double(), v.double(), blocks, 0.3)
    torch.testing.assert_close(out.double(), expected, **TOLERANCES[NAMES[dtype]]._asdict())
    torch.testing.assert_close(lse, expected_lse.float(), **TOLERANCES["float32_reordered"]._asdict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_by_block(number: int, stand_in: StandIn, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 17, 2, 8, dtype=dtype)
    grad = torch.randn(2, 2, 8, 17, dtype=dtype).permute(0, 3, 1, 2)
    out, lse = reference.scale_block_attention(q, k, v, BLOCKS, 0.3)
    given = (grad, q, k, v, out, lse, BLOCKS, 0.3)
    found = op._attention_backward_flash(VERSIONS[number], *given)
    assert stand_in.calls == list(zip(BLOCKS, ends(BLOCKS), strict=True))
    for actual, want in zip(found, reference.scale_block_attention_backward(*given), strict=True):
        assert actual.dtype == dtype and actual.is_contiguous()
        torch.testing.assert_close(actual, want, **TOLERANCES[NAMES[dtype]]._asdict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache(number: int, stand_in: StandIn, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 17, 2, 8, dtype=dtype)
    k[:, 11:], v[:, 11:] = torch.nan, torch.nan
    out = op._cached_attention_flash(VERSIONS[number], q[:, :3], k, v, 11, 0.3)
    assert stand_in.calls == [(3, 11)] and out.is_contiguous()
    expected = reference.cached_attention(q[:, :3], k, v, 11, 0.3)
    torch.testing.assert_close(out, expected, **TOLERANCES[NAMES[dtype]]._asdict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_through_the_ops(
    number: int, stand_in: StandIn, gpu: Callable[[int, int], None], dtype: torch.dtype
) -> None:
    """Rows at odd addresses are copied to where they can be read."""
    gpu(9, 0)
    q, k, v = (t[..., 1:].requires_grad_() for t in qkv(2, 17, 2, 9, dtype=dtype))
    weight = torch.randn(2, 17, 2, 8, dtype=dtype)
    results = []
    for name in ("flash_attn", "reference"):
        with use_backend(name):
            out, lse = scale_block_attention(q, k, v, block_lengths=BLOCKS, return_lse=True)
            grads = torch.autograd.grad(out, (q, k, v), weight)
            with torch.no_grad():
                results.append((out, lse, *grads, cached_attention(q[:, -2:], k, v, 17)))
        assert len(stand_in.calls) == (6 if number == 3 else 9)
    for actual, want in zip(*results, strict=True):
        torch.testing.assert_close(actual, want, **TOLERANCES[NAMES[dtype]]._asdict())


@pytest.mark.parametrize(
    ("capability", "installed", "head_dim", "chosen"),
    [
        ((9, 0), (2, 3, 4), 8, 4),
        ((9, 0), (2, 3), 8, 3),
        ((9, 0), (2, 4), 8, 4),
        ((9, 0), (2, 3, 4), 136, 3),
        ((10, 0), (2, 3, 4), 8, 4),
        ((10, 0), (2, 3), 8, 2),
        ((10, 0), (2, 4), 136, 2),
        ((8, 6), (2, 3, 4), 8, 2),
        ((12, 0), (2, 3, 4), 8, 2),
    ],
)
def test_the_newest_that_can_run(
    capability: tuple[int, int],
    installed: tuple[int, ...],
    head_dim: int,
    chosen: int,
    gpu: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu(*capability)
    stand_ins = install(monkeypatch, *installed)
    q = torch.zeros(1, 2, 1, head_dim, dtype=torch.float16)
    with use_backend("flash_attn"):
        scale_block_attention(q, q, q, block_lengths=[2])
    assert [number for number, stand_in in stand_ins.items() if stand_in.calls] == [chosen]


def reason(head_dim: int = 8) -> str | None:
    q = torch.zeros(1, 2, 1, head_dim, dtype=torch.float16)
    found: str | None = op._attention.backends["flash_attn"].reason(q, q, q, [2], 1.0)
    return found


# What each version has code for: 2 for Ampere and all later chips, 3 for Hopper's own instructions, which no
# later chip has, 4 in all its releases for Hopper and the Blackwells of data centres and Jetsons.
CAPABLE = {
    (7, 0): set(),
    (7, 5): set(),
    (8, 0): {2},
    (8, 6): {2},
    (8, 9): {2},
    (9, 0): {2, 3, 4},
    (10, 0): {2, 4},
    (10, 3): {2, 4},
    (11, 0): {2, 4},
    (12, 0): {2},
    (12, 1): {2},
}


@pytest.mark.parametrize(("capability", "able"), CAPABLE.items(), ids=str)
def test_each_version_runs_where_it_has_code_and_nowhere_else(
    number: int,
    stand_in: StandIn,
    gpu: Callable[[int, int], None],
    capability: tuple[int, int],
    able: set[int],
) -> None:
    """It is installed in any case; no other is."""
    gpu(*capability)
    q = torch.zeros(1, 2, 1, 8, dtype=torch.float16)
    calls = {
        op._attention: (q, q, q, [2], 1.0),
        op._attention_backward: (q, q, q, q, q, torch.zeros(1, 1, 2), [2], 1.0),
        op._cached_attention: (q, q, q, 2, 1.0),
    }
    for called, args in calls.items():
        found = called.backends["flash_attn"].reason(*args)
        assert (found is None) == (number in able), found
        if found is not None:
            assert f"FlashAttention {number}: needs compute capability" in found
            with (
                use_backend("flash_attn"),
                pytest.raises(BackendUnavailableError, match="needs compute capab"),
            ):
                called.run(*args)
        else:
            with use_backend("flash_attn"):
                called.run(*args)
    assert bool(stand_in.calls) == (number in able)


def test_the_capability_is_that_of_the_tensors_device(
    gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine of two kinds of GPU, of which the first is the current one."""
    gpu(9, 0)
    chips = {None: (9, 0), torch.device("cuda:0"): (9, 0), torch.device("cuda:1"): (8, 6)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: chips[device])
    install(monkeypatch, 3)
    with torch._subclasses.FakeTensorMode():
        for device, able in (("cuda:0", True), ("cuda:1", False)):
            q = torch.zeros(1, 2, 1, 8, dtype=torch.float16, device=device)
            assert (op._attention.backends["flash_attn"].reason(q, q, q, [2], 1.0) is None) == able


def test_why_no_version_can_run(gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(9, 0)
    install(monkeypatch)
    missing = "import of {} halted; None in sys.modules"
    assert reason() == op._attention.backends["flash_attn"].available()
    assert reason() == (
        f"FlashAttention 4: {missing.format('flash_attn.cute.interface')}; "
        f"FlashAttention 3: {missing.format('flash_attn_interface')}; "
        f"FlashAttention 2: {missing.format('flash_attn.flash_attn_interface')}"
    )
    backends._flash_reasons.cache_clear()
    install(monkeypatch, 2, 3, 4)
    assert reason() is op._attention.backends["flash_attn"].available() is None
    assert reason(264) == (
        "FlashAttention 4: needs D of at most 128, found 264; "
        "FlashAttention 3: needs D of at most 256, found 264; "
        "FlashAttention 2: needs D of at most 256, found 264"
    )
    gpu(7, 5)
    assert reason() == (
        "FlashAttention 4: needs compute capability 9 to 11, found 7; "
        "FlashAttention 3: needs compute capability 9, found 7; "
        "FlashAttention 2: needs compute capability 8 to 12, found 7"
    )


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = op._attention.backends["flash_attn"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.available() == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backend.available() == "no CUDA device"


def test_packages_as_they_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 4 alone leaves a folder `flash_attn` without version 2; a build for another torch fails."""
    package = tmp_path / "flash_attn" / "cute"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "interface.py").touch()
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: aoti')")
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
            del sys.modules[name]
        found = {number: version.unable(9, 64) for number, version in VERSIONS.items()}
    missing = "No module named 'flash_attn.flash_attn_interface'"
    assert found == {4: None, 3: "undefined symbol: aoti", 2: missing}


def test_calls_that_it_cannot_run() -> None:
    def refusal(*shape: int, dtype: torch.dtype = torch.float16, scale: float = 1.0) -> str | None:
        q = torch.zeros(shape, dtype=dtype, device="cuda")
        reasons = {
            op._attention.backends["flash_attn"].refusal((q, q, q, [2], scale)),
            op._cached_attention.backends["flash_attn"].refusal((q, q, q, 2, scale)),
            op._attention_backward.backends["flash_attn"].refusal((q, q, q, q, q, q.float(), [2], scale)),
        }
        found: str | None
        (found,) = {reason and reason.replace("found grad", "found q") for reason in reasons}
        return found

    with torch._subclasses.FakeTensorMode():
        assert refusal(1, 2, 3, 8) is None
        assert refusal(1, 2, 3, 8, dtype=torch.float32) == "needs float16 or bfloat16, found q of float32"
        assert refusal(1, 2, 3, 4) == "needs D of a multiple of 8, found 4"
        assert refusal(0, 2, 3, 8) == "needs tensors that hold values, found (0, 2, 3, 8)"
        assert refusal(1, 2, 3, 8, scale=-1.0) == "needs a softmax_scale above 0, found -1.0"


def test_forcing_it_is_refused_with_its_reason() -> None:
    q = torch.zeros(1, 2, 1, 8)
    expected = "flash_attn  needs CUDA tensors, found q on cpu"
    with use_backend("flash_attn"), pytest.raises(BackendUnavailableError, match=expected):
        scale_block_attention(q, q, q, block_lengths=[2])


def test_a_missing_extension_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's flash kernel runs in its place, and where the extension has no code."""
    monkeypatch.delenv("HITSR_FAST_CPU_ISA", raising=False)  # a set that is forced must not be missing
    monkeypatch.setattr(extension, "unavailable", lambda module="_C": "not built")
    extension.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dtype, count in ((torch.float64, 0), (torch.float32, 1), (torch.bfloat16, 1)):
            q, k, v = qkv(1, 17, 2, 8, dtype=dtype)
            out = scale_block_attention(q, k, v, block_lengths=BLOCKS)
            assert len(caught) == count
            expected = reference.scale_block_attention(q, k, v, BLOCKS, 8**-0.5)[0]
            torch.testing.assert_close(
                out, expected, **TOLERANCES[NAMES.get(dtype, "float64_reordered")]._asdict()
            )
    assert "hitsr_fast._C: not built" in str(caught[0].message)
