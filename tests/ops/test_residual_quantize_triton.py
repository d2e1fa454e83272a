"""What Triton's launchers of the residual quantizer start, and with which blocks."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hitsr_fast.backends import cdiv
from hitsr_fast.nn import QuantizerBank
from hitsr_fast.ops import (
    Metric,
    prepare_codebook,
    residual_decode,
    residual_quantize,
)
from hitsr_fast.ops import residual_quantize_cuda as cuda
from hitsr_fast.ops import residual_quantize_triton as triton
from hitsr_fast.ops.packed_codebook import LAYOUT, pack_eager
from hitsr_fast.reference.nearest_code import nearest_code as definition
from hitsr_fast.reference.residual_quantize import DecodeCall
from tests.ops.backends import SHIPPED, placed, refusal
from tests.ops.residual_quantizer import (
    bank,
    encode_arguments,
    rows,
)
from tests.ops.test_residual_quantize import HIT, METRICS, RECTANGLE, check
from tests.tolerances import TOLERANCES


@pytest.mark.backends("triton")
def test_as_shipped(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, shipped in SHIPPED.items():
        monkeypatch.setattr(*place, shipped)
    for ratio in (0.0, 0.5):
        problem = {"size": (4, 9), "scales": [(2, 2), (4, 9)], "phi_index": [1, 0], "phi_ratio": ratio}
        check(torch.randn(1, 20, 4, 9), bank(140, 20, dtype=torch.float32), problem)


@pytest.mark.backends("triton")
@pytest.mark.parametrize(
    ("few", "search", "update", "workspace"), [(4096, 1, 1, 2**23), (0, 7, 3, 2**23), (4096, 512, 1024, 1)]
)
def test_cuts_do_not_matter(
    backend: str, few: int, search: int, update: int, workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of rows and places in turns or all at once, tiles of codes shared out or not."""
    z, codes = torch.randn(2, 3, 9, 5), bank(400, dtype=torch.float32)
    arguments = encode_arguments(RECTANGLE)
    expected = residual_quantize(z, *codes, **arguments, return_inputs=True)
    monkeypatch.setattr(triton, "_FEW_ROWS", few)
    monkeypatch.setattr(triton, "_SEARCH_PROGRAMS", search)
    monkeypatch.setattr(triton, "_UPDATE_PROGRAMS", update)
    monkeypatch.setattr(triton, "_WORKSPACE", workspace)
    found = residual_quantize(z, *codes, **arguments, return_inputs=True)
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(one, other)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("metric", METRICS)
def test_the_search_is_exact_on_what_it_pools(backend: str, metric: Metric) -> None:
    """The pooling kernel gives the very rows that the search has pooled."""
    z, codes = torch.randn(2, 6, 7, 11) + 100, bank(300, 6, dtype=torch.float32)
    codes = codes._replace(codebook=codes.codebook + 100)
    lanes = set()
    for h, w in [(1, 1), (2, 2), (6, 5), (7, 8)]:
        pooled, scale = torch.empty(2, h * w, 6), triton.Scale(h, w, 0, 0)
        lanes.add(triton.search_constants(6, metric, 2 * h * w, places_of(scale, z))["LANES"])
        triton._pool(z, scale, pooled)
        found = residual_quantize(z, *codes, scales=[(h, w)], phi_index=[0], metric=metric)
        assert torch.equal(found.indices.flatten(), definition(pooled.flatten(0, 1), codes.codebook, metric))
        torch.testing.assert_close(pooled, rows(z, (h, w)), **TOLERANCES["float32_reordered"]._asdict())
    assert lanes == {1, 8, 32}


def places_of(scale: triton.Scale, z: Tensor) -> int:
    """Of the largest bin."""
    bins = triton._bins(scale, z)
    return bins[-2] * bins[-1]


@pytest.mark.parametrize("side", [1, 2, *HIT["scales"]])
def test_pooling_is_no_chain(side: int) -> None:
    """Of one image: how many loads of a program, and how many additions, wait for the ones before them.

    A thread of 128 adds up at most 32 values at a time; the whole map is 256 values for each.
    """
    z, scale = torch.empty(1, 32, 32, 32, device="meta"), triton.Scale(side, side, 0, 0)
    places = places_of(scale, z)
    blocks = triton.search_constants(32, "l2", side**2, places)
    lanes, together = blocks["LANES"], blocks["PLACES"]
    assert blocks["BLOCK_P"] * blocks["BLOCK_M"] * lanes * together <= 32 * 128
    tiles = cdiv(min(side**2, blocks["BLOCK_N"]), blocks["BLOCK_M"]) * cdiv(32, blocks["BLOCK_P"])
    turns = cdiv(places, lanes * together)
    assert tiles * turns <= 8
    assert turns * together + lanes.bit_length() - 1 <= 37
    # Of the kernel that only pools, whose programs are many.
    blocks = triton.pool_constants(32, 64, places, triton._POOLED_ALONE)
    assert cdiv(places, blocks["LANES"] * blocks["PLACES"]) <= 8
    assert cdiv(side**2, blocks["BLOCK_M"]) * cdiv(32, blocks["BLOCK_P"]) >= 8


def test_few_places_are_cut_into_more_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_target", lambda: "cuda")
    codebook, weight, bias = bank(K=2, C=32, dtype=torch.float32)
    for batch, programs in [(1, 64), (4, 256), (8, 128), (64, 1024)]:
        out = torch.empty(batch, 32, 32, 32, device="meta")
        assert triton._Updater(codebook, weight, bias, 0.5, out)._programs == programs
    whole, half = (triton.update_constants(32, True, places) for places in (2**20, 2**10))
    assert whole["ROWS"] * whole["COLUMNS"] == 4 * half["ROWS"] * half["COLUMNS"]


@pytest.mark.backends("triton")
def test_indices_beyond_the_codebook_read_nothing_beyond_it(backend: str) -> None:
    """On a GPU nobody looks at them before: they count as the first and the last code."""
    codes = bank(5, 3, dtype=torch.float32)
    (indices,) = placed(torch.tensor([[7, -1, 2, 2**40, -(2**40)]]))
    options = ([1, 1, 2, 2], [0, 1], [2, 2], 0.0, False, False)
    found, expected = (
        triton.residual_decode_triton(given, *codes, *options)[0] for given in (indices, indices.clamp(0, 4))
    )
    assert torch.equal(found, expected)


@pytest.mark.backends("triton")
def test_blocks_of_few_places_and_of_many(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "update_constants", SHIPPED[triton, "update_constants"])
    z, codes = torch.randn(1, 40, 5, 9), bank(20, 40, dtype=torch.float32)
    found = []
    for few in (0, 2**12):
        monkeypatch.setattr(triton, "_FEW_PLACES", few)
        found.append(residual_quantize(z, *codes, scales=[(2, 3), (5, 9)], phi_index=[0, 1]))
    assert torch.equal(found[0].indices, found[1].indices)
    torch.testing.assert_close(
        found[0].reconstruction, found[1].reconstruction, **TOLERANCES["float32_reordered"]._asdict()
    )


def test_phi_by_taps_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once laid out, the weights are not laid out again in each call."""
    monkeypatch.setattr(triton, "_target", lambda: "cuda")
    plain = QuantizerBank(*bank(C=8, dtype=torch.float32), (0,), 0.5)
    laid_out = plain.by_taps()
    assert torch.equal(laid_out.phi_weight, plain.phi_weight)
    indices = torch.zeros(1, 1, dtype=torch.int64)
    results = triton._Results(*(torch.empty(1, 8, 4, 4) for _ in range(3)))
    for codes, copied in [(plain, True), (laid_out, False)]:
        call = DecodeCall(indices, *codes.tensors, [1, 1], [0], [4, 4], 0.5, False, False)
        weight = triton._Updater.of(call, results)._weight
        assert (weight.data_ptr() != codes.phi_weight.data_ptr()) == copied
        assert weight.stride() == laid_out.phi_weight.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_phi_is_packed_for_cuda_by_one_copy(dtype: torch.dtype) -> None:
    weight, written = torch.randn(3, 8, 8, 3, 3).to(dtype), []

    class Writes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.copy_.default, torch.ops.aten.clone.default):
                written.append(func)
            assert func is not torch.ops.aten._to_copy.default
            return func(*args, **(kwargs or {}))

    with Writes():
        packed = cuda.pack_phi(weight)
    assert len(written) == 1
    for p, tap, quad, out, i in [(0, 0, 0, 0, 0), (2, 5, 1, 7, 3), (1, 8, 0, 3, 2)]:
        assert packed[p, tap, quad, out, i] == weight[p, out, 4 * quad + i, tap // 3, tap % 3]


@pytest.mark.backends("triton")
@pytest.mark.parametrize("metric", METRICS)
def test_prepared_codebooks_are_of_the_launcher(backend: str, metric: Metric) -> None:
    z, codes = torch.randn(1, 3, 4, 5), bank(40, dtype=torch.float32)
    prepared = prepare_codebook(codes.codebook, metric=metric)
    assert prepared.layout == LAYOUT
    arguments: dict[str, Any] = {"scales": [2, (4, 5)], "phi_index": [0, 1], "metric": metric}
    one, other = (residual_quantize(z, *codes, **arguments, prepared=p) for p in (prepared, None))
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.reconstruction, other.reconstruction)


def test_what_triton_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    z, codes = torch.zeros(1, 3, 2, 2), bank(dtype=torch.float32)
    indices = torch.zeros(1, 1, dtype=torch.int64)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = refusal("residual_step", "triton", z, indices, *codes)
    assert reason == "needs CUDA or HIP tensors, found reconstruction on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert refusal("residual_step", "triton", z, indices, *codes) is None
    wide = torch.zeros(1, 257), codes.phi_weight, codes.phi_bias
    assert refusal("residual_decode", "triton", indices, *wide) == "needs C of at most 256, found 257"


class Launches:
    """In place of the kernels: remembers which were started, and starts none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for op in ("residual_quantize", "pack_codebook"):
            kernels = importlib.import_module(f"hitsr_fast.kernels.{op}")
            for name in (name for name in vars(kernels) if name.endswith("_kernel")):
                monkeypatch.setattr(kernels, name, self._kernel(name))

    def _kernel(self, name: str) -> Any:
        log = self.names

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                assert min(grid) > 0
                return lambda *arguments, **constants: log.append(name)

        return Kernel()


@pytest.fixture
def _fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of a GPU that have no values: to look at one, as waiting for the device would, is an error."""
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(triton, "_target", lambda: "cuda")
    monkeypatch.setattr(triton, "_capability", lambda: 90)
    monkeypatch.setattr(triton, "_GRAPH_PLACES", 0)
    with FakeTensorMode():
        yield


@pytest.mark.backends("triton")
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_one_launch_decodes_what_one_a_scale_does(backend: str, ratio: float) -> None:
    codes, indices = bank(9, 5, 2, dtype=torch.float32), torch.randint(9, (2, 27))
    sizes: dict[str, Any] = {
        "scales": [(1, 1), (2, 3), (4, 5)],
        "phi_index": [0, 1, 1],
        "phi_ratio": ratio,
        "size": (9, 7),
    }
    codes = type(codes)(*placed(*codes))
    (indices,) = placed(indices)
    whole = residual_decode(indices, *codes, **sizes).reconstruction
    assert torch.equal(whole, residual_decode(indices, *codes, **sizes, per_scale=True).reconstruction)


@pytest.mark.parametrize("replayed", [0, 116, 3452])
@pytest.mark.parametrize("wanted", [False, True])
def test_two_kernels_a_scale_and_the_host_never_waits(
    replayed: int, wanted: bool, monkeypatch: pytest.MonkeyPatch, _fake_gpu: None
) -> None:
    launches = Launches(monkeypatch)
    z = torch.empty(2, 32, 32, 32, device="cuda")
    codebook = torch.empty(4096, 32, device="cuda")
    phi = torch.empty(4, 32, 32, 3, 3, device="cuda"), torch.empty(4, 32, device="cuda")
    flat = [side for scale in HIT["scales"] for side in (scale, scale)]
    replay = torch.empty(2, replayed, dtype=torch.int64, device="cuda") if replayed else None
    layout, parts = pack_eager(codebook, "l2")
    with pytest.raises(Exception, match="local_scalar_dense"):
        z.sum().item()
    found = triton.residual_quantize_triton(
        z, codebook, *phi, list(parts), layout, flat, HIT["phi_index"], 0.5, replay, "l2", wanted, wanted
    )
    search, update, pool = "search", "update", "pool"
    scales = {0: 0, 116: 3, 3452: 10}[replayed]
    first = [update] + [pool, update] * 9 if wanted else [update] * 10
    expected = first[: 2 * scales - 1 if wanted else scales] if scales else []
    expected = expected + [search, update] * (10 - scales)
    assert launches.names == [f"_residual_quantize_{name}_kernel" for name in expected]
    assert [x.device.type for x in found] == ["cuda"] * 4

    # Two more pack a codebook that is not packed, where one is searched.
    prepared, launches.names[:] = list(launches.names), []
    triton.residual_quantize_triton(
        z, codebook, *phi, [], "", flat, HIT["phi_index"], 0.5, replay, "l2", wanted, wanted
    )
    packing = ["_pack_codebook_ranges_kernel", "_pack_codebook_kernel"] if scales < 10 else []
    assert sorted(launches.names) == sorted(packing + prepared)
    assert [name for name in launches.names if "pack" in name] == packing

    launches.names.clear()
    triton.residual_decode_triton(
        found[1], codebook, *phi, flat, HIT["phi_index"], [32, 32], 0.5, wanted, wanted
    )
    one_by_one = [f"_residual_quantize_{name}_kernel" for name in first]
    assert launches.names == (one_by_one if wanted else ["_residual_decode_kernel"])

    launches.names.clear()
    triton.residual_step_triton(z, found[1][:, :16], codebook, phi[0][0], phi[1][0], [4, 4], [6, 6], 0.5)
    assert launches.names == [f"_residual_quantize_{name}_kernel" for name in (update, pool)]
