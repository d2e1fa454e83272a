"""The Triton backend of the residual quantizer: its cases on Triton's interpreter, and when it cannot run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from benchmarks.shapes import MODELS
from hitsr_fast.dispatch import BackendUnavailableError, use_backend
from hitsr_fast.kernels import residual_quantize as kernels
from hitsr_fast.ops import nearest_code_triton, prepare_codebook, residual_decode, residual_quantize
from hitsr_fast.ops import residual_quantize_triton as triton
from tests.ops.interpreter import run_cases
from tests.ops.residual_quantizer import assert_agrees, assert_as_good, bank

HIT: dict[str, Any] = {
    "scales": list(MODELS["hit-d16"].scales),
    "phi_index": [0, 0, 1, 1, 1, 2, 2, 3, 3, 3],
}


def test_interpreted() -> None:
    run_cases("residual_quantize_interpreted.py")


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    z, codes = torch.zeros(1, 3, 2, 2), bank(dtype=torch.float32)
    indices = torch.zeros(1, 1, dtype=torch.int64)
    reason = triton.available() or triton.supports_quantize(z, *codes)
    assert reason is not None
    for call in (
        lambda: residual_quantize(z, *codes, scales=[1], phi_index=[0]),
        lambda: residual_decode(indices, *codes, scales=[1], phi_index=[0], size=(2, 2)),
    ):
        with use_backend("triton"), pytest.raises(BackendUnavailableError) as error:
            call()
        assert f"triton      {reason}" in str(error.value)
    assert triton.supports_step(z, indices, codes.codebook) == (
        "needs CUDA or HIP tensors, found reconstruction on cpu"
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton.supports_quantize(z.double(), *codes) is None
    assert triton.supports_decode(indices, codes.codebook.double()) == (
        "needs a codebook of float16, bfloat16 or float32, found float64"
    )
    assert triton.supports_decode(indices, torch.zeros(1, 257)) == "needs C of at most 256, found 257"


class Launches:
    """In place of the kernels: remembers which were started, and starts none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for name in kernels.__all__:
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
    monkeypatch.setattr(triton, "_GRAPH_PLACES", 0)
    with FakeTensorMode():
        yield


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
    layout, parts = nearest_code_triton.prepare(codebook, "l2")
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

    launches.names.clear()
    triton.residual_decode_triton(
        found[1], codebook, *phi, flat, HIT["phi_index"], [32, 32], 0.5, wanted, wanted
    )
    assert launches.names == [f"_residual_quantize_{name}_kernel" for name in first]

    launches.names.clear()
    triton.residual_step_triton(z, found[1][:, :16], codebook, phi[0][0], phi[1][0], [4, 4], [6, 6], 0.5)
    assert launches.names == [f"_residual_quantize_{name}_kernel" for name in (update, pool)]


@pytest.mark.gpu
def test_graphs_on_a_gpu() -> None:
    """Captured, replayed with other values, and inside a caller's capture: always what the kernels give."""
    codebook, *phi = (tensor.cuda() for tensor in bank(4096, 32, 4, dtype=torch.float32))
    prepared = prepare_codebook(codebook)
    latents = [torch.randn(2, 32, 32, 32, device="cuda") for _ in range(4)]
    with use_backend("triton"):
        expected = [residual_quantize(z, codebook, *phi, **HIT) for z in latents]
        for z, plain in zip(latents, expected, strict=True):
            found = residual_quantize(z, codebook, *phi, **HIT, prepared=prepared)
            assert torch.equal(found.indices, plain.indices)
            assert torch.equal(found.reconstruction, plain.reconstruction)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = residual_quantize(latents[0], codebook, *phi, **HIT, prepared=prepared)
        graph.replay()
        assert torch.equal(captured.indices, expected[0].indices)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_on_a_gpu(batch: int) -> None:
    codes = bank(4096, 32, 4, dtype=torch.float32)
    z = torch.randn(batch, 32, 32, 32)
    on_gpu = [tensor.cuda() for tensor in codes]
    with use_backend("triton"):
        found = residual_quantize(z.cuda(), *on_gpu, **HIT, inputs=True, per_scale=True)
        decoded = residual_decode(found.indices, *on_gpu, **HIT, size=32, inputs=True, per_scale=True)
    for one, other in zip(decoded, found[1:], strict=True):
        assert torch.equal(one, other)
    assert_agrees(found, z, codes, **HIT)
    with use_backend("reference"):
        expected = residual_quantize(z, *codes, **HIT)
    on_cpu = type(found)(*(tensor.cpu() for tensor in found))
    assert_as_good(on_cpu, expected, z)
