"""The residual quantizer on a GPU: what neither the interpreter nor the host can show."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import (
    nearest_code,
    prepare_codebook,
    residual_decode,
    residual_quantize,
)
from tests.ops.backends import require
from tests.ops.residual_quantizer import (
    assert_agrees,
    assert_as_good,
    bank,
)
from tests.ops.test_residual_quantize import HIT
from tests.tolerances import TOLERANCES

pytestmark = pytest.mark.gpu

BACKENDS = ("triton", "cuda")


@pytest.mark.parametrize("name", BACKENDS)
def test_no_packed_codebook_is_stale(name: str) -> None:
    """Also where packing is part of a graph: it reads the codebook, whoever has written to it."""
    require(name)
    codebook, *phi = (tensor.cuda() for tensor in bank(4096, 32, 4, dtype=torch.float32))
    z = torch.randn(2, 32, 32, 32, device="cuda")
    for _ in range(5):
        codebook.data.copy_(codebook.roll(1, 0))  # moves no version counter
        with use_backend(name):
            found = residual_quantize(z, codebook, *phi, **HIT)
        first = nearest_code(z.mean((2, 3)), codebook)  # of nothing but the mean of the map
        with use_backend("reference"):
            expected = nearest_code(z.mean((2, 3)), codebook)
        assert torch.equal(first, expected)
        with use_backend(name):
            again = residual_quantize(z, codebook.clone(), *phi, **HIT)
        assert torch.equal(found.indices, again.indices)


@pytest.mark.parametrize("name", BACKENDS)
def test_graphs(name: str) -> None:
    """Captured, replayed with other values, and inside a caller's capture: always what the kernels give."""
    require(name)
    codebook, *phi = (tensor.cuda() for tensor in bank(4096, 32, 4, dtype=torch.float32))
    prepared = prepare_codebook(codebook)
    latents = [torch.randn(2, 32, 32, 32, device="cuda") for _ in range(4)]
    with use_backend(name):
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


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("batch", [1, 3, 8, 64])
def test_agrees_at_full_size(name: str, batch: int) -> None:
    """Of the CUDA backend that is 103 KiB of shared memory, and clusters where a chip has them."""
    require(name)
    codes = bank(4096, 32, 4, dtype=torch.float32)
    z = torch.randn(batch, 32, 32, 32)
    on_gpu = [tensor.cuda() for tensor in codes]
    with use_backend(name):
        found = residual_quantize(z.cuda(), *on_gpu, **HIT, return_inputs=True, per_scale=True)
        decoded = residual_decode(found.indices, *on_gpu, **HIT, size=32, return_inputs=True, per_scale=True)
    for one, other in zip(decoded, found[1:], strict=True):
        assert torch.equal(one, other)
    assert_agrees(found, z, codes, **HIT)
    with use_backend("reference"):
        expected = residual_quantize(z, *codes, **HIT)
    on_cpu = type(found)(*(tensor.cpu() for tensor in found))
    assert_as_good(on_cpu, expected, z)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("batch", "repeats"), [(1, 300), (64, 50)])
def test_repeats_itself(name: str, batch: int, repeats: int) -> None:
    """Programs that share out the codes of one block count each other in; nothing may be left of that."""
    require(name)
    codes = [tensor.cuda() for tensor in bank(4096, 32, 4, dtype=torch.float32)]
    z = torch.randn(batch, 32, 32, 32, device="cuda")
    with use_backend(name):
        first = residual_quantize(z, *codes, **HIT)
        for _ in range(repeats):
            again = residual_quantize(z, *codes, **HIT)
            assert torch.equal(again.indices, first.indices)
            assert torch.equal(again.reconstruction, first.reconstruction)


@pytest.mark.parametrize("name", BACKENDS)
def test_threads_of_two_sizes(name: str) -> None:
    """One thread's maps are large, another's small, and so is the shared memory that each asks for."""
    require(name)
    codes = [tensor.cuda() for tensor in bank(4096, 32, 4, dtype=torch.float32)]
    failures: list[BaseException] = []

    def work(side: int) -> None:
        try:
            z = torch.randn(1, 32, side, side, device="cuda")
            with use_backend(name):
                expected = residual_quantize(z, *codes, scales=[1, side], phi_index=[0, 1]).indices
                for _ in range(500):
                    found = residual_quantize(z, *codes, scales=[1, side], phi_index=[0, 1]).indices
                    assert torch.equal(found, expected)
        except BaseException as error:  # which a thread would keep to itself
            failures.append(error)

    workers = [threading.Thread(target=work, args=[side]) for side in (32, 16, 32, 8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.parametrize("name", BACKENDS)
def test_other_streams(name: str) -> None:
    require(name)
    codes = [tensor.cuda() for tensor in bank(4096, 32, 4, dtype=torch.float32)]
    z = torch.randn(2, 32, 32, 32, device="cuda")
    with use_backend(name):
        expected = residual_quantize(z, *codes, **HIT).indices
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = [residual_quantize(z, *codes, **HIT).indices for _ in range(4)]
        torch.cuda.current_stream().wait_stream(stream)
        assert all(torch.equal(indices, expected) for indices in found)


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_are_those_of_float64(name: str) -> None:
    """To float32's places: a convolution in TF32 would miss by a thousandth."""
    require(name)
    codes = bank(4096, 32, 4, dtype=torch.float64)
    indices, weight = torch.randint(4096, (2, 3452)), torch.randn(2, 32, 32, 32, dtype=torch.float64)

    def gradients(chosen: str, device: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in codes]
        with use_backend(chosen):
            out = residual_decode(indices.to(device), *leaves, **HIT, size=32).reconstruction
            return list(torch.autograd.grad((out * weight.to(out)).sum(), leaves))

    expected = gradients("reference", "cpu", torch.float64)
    for found, exact in zip(gradients(name, "cuda", torch.float32), expected, strict=True):
        assert (found.cpu().double() - exact).norm() <= TOLERANCES["float32_reordered"].rtol * exact.norm()
