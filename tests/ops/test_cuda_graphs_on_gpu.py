"""What only a GPU shows of CUDA graphs: the same rules with PyTorch's own captures."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hitsr_fast.ops import nearest_code, prepare_codebook, residual_quantize
from hitsr_fast.ops.cuda_graphs import Graphs
from tests.ops.residual_quantizer import bank

pytestmark = pytest.mark.gpu

SCALES = [(1, 1), (2, 2), (4, 4)]


def launch(x: Tensor, weight: Tensor, size: int) -> tuple[Tensor, ...]:
    spare = x.new_zeros(size)
    result = x * weight
    del spare
    return (result + x.new_ones(1),)


def check(graphs: Graphs, weight: Tensor, size: int = 1, times: int = 5, captured: bool = True) -> None:
    for _ in range(times):
        x = torch.randn(7, 3, device=weight.device)
        assert torch.equal(graphs((x,), weight, size)[0], launch(x, weight, size)[0])
    assert any(kind.replays > 0 for kind in graphs._kinds.values()) == captured


def weight(device: int = 0) -> Tensor:
    return torch.randn(3, device=f"cuda:{device}")


@pytest.mark.parametrize("first", [0, 1])
def test_each_device_has_its_graphs(first: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, found one")
    graphs = Graphs(launch)
    for device in (first, 1 - first):
        check(graphs, weight(device))  # whichever is the current one
        with torch.cuda.device(1 - device):
            check(graphs, weight(device))


def test_streams_take_turns() -> None:
    """Long replays on many streams at once overwrite each other's memory unless they wait."""
    graphs, w, size = Graphs(launch), weight(), 2**24
    check(graphs, w, size)
    streams, calls = [torch.cuda.Stream() for _ in range(4)], []
    torch.cuda.synchronize()
    for number in range(64):
        with torch.cuda.stream(streams[number % 4]):
            x = torch.full((7, 3), float(number), device="cuda")
            calls.append((x, graphs((x,), w, size)[0]))
    torch.cuda.synchronize()
    for x, found in calls:
        assert torch.equal(found, launch(x, w, 1)[0])


def test_threads_capture_in_turn() -> None:
    together, errors = threading.Barrier(4, timeout=60), []

    def work() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(16):
                    graphs, w = Graphs(launch), weight()
                    for call in range(3):
                        together.wait()
                        check(graphs, w, times=1, captured=call == 2)
        except BaseException as error:
            errors.append(error)
            together.abort()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


@pytest.mark.parametrize(
    "modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)], ids=str
)
def test_buffers_outlive_the_mode_that_they_were_made_in(modes: Sequence[Callable[[], Any]]) -> None:
    graphs, w = Graphs(launch), weight()
    for mode in modes:
        with mode():
            check(graphs, w)


def test_what_cannot_be_captured_runs_and_says_so_once() -> None:
    def looks(x: Tensor, weight: Tensor, size: int) -> tuple[Tensor, ...]:
        if size > 1:
            x.sum().item()
        return launch(x, weight, size)

    graphs, w, stream = Graphs(looks), weight(), torch.cuda.current_stream()
    check(graphs, w)
    with pytest.warns(RuntimeWarning, match="looks could not be captured") as caught:
        for size in (2, 3):
            check(graphs, w, size)
    assert len([one for one in caught if "run without one" in str(one.message)]) == 1
    assert torch.cuda.current_stream() == stream
    check(graphs, w)
    check(graphs, w, 0, times=32)  # captured in another pool
    assert len([kind for kind in graphs._kinds.values() if kind.captured]) == 2


def test_kinds_share_a_pool_that_goes_with_its_owner() -> None:
    class Owner:
        def __init__(self) -> None:
            self.graphs = Graphs(self.walk)

        def walk(self, x: Tensor, weight: Tensor, size: int) -> tuple[Tensor, ...]:
            return launch(x, weight, size)

    def allocated() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    gc.collect()
    w, owner, before = weight(), Owner(), allocated()
    for size in range(2**24, 2**24 - 8, -1):  # 64 MiB
        check(owner.graphs, w, size)
    (memory,) = owner.graphs._memories.values()
    assert memory.bytes() < 2 * 2**26
    assert allocated() - before < 3 * 2**26
    gc.disable()
    try:
        del owner, memory
        assert allocated() <= before
    finally:
        gc.enable()


def test_beyond_the_limit_calls_just_run() -> None:
    graphs, w = Graphs(launch, limit=2**25), weight()
    with pytest.warns(RuntimeWarning, match="more than 33554432"):
        check(graphs, w, 2**24, captured=False)


@pytest.mark.parametrize("prepared", [False, True])
def test_ops_in_a_capture_of_the_callers(prepared: bool) -> None:
    quantizer = [tensor.cuda() for tensor in bank(K=64, C=8, dtype=torch.float32)]
    packed = prepare_codebook(quantizer[0]) if prepared else None
    z = torch.randn(2, 8, 4, 4, device="cuda")

    def run() -> tuple[Tensor, ...]:
        tokens = residual_quantize(z, *quantizer, scales=SCALES, phi_index=[0] * 3, prepared=packed)
        return tokens.indices, tokens.reconstruction, nearest_code(z, packed or quantizer[0])

    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for _ in range(3):
        z.normal_()
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(results, run(), strict=True))


def test_within_the_compilers_graphs() -> None:
    """`reduce-overhead` warms up, captures and replays; ours keep out of it and go on outside."""
    quantizer = [tensor.cuda() for tensor in bank(K=64, C=8, dtype=torch.float32)]
    packed = prepare_codebook(quantizer[0])

    def twice(z: Tensor) -> Tensor:
        total = z.new_zeros(())
        for _ in range(2):
            tokens = residual_quantize(z, *quantizer, scales=SCALES, phi_index=[0] * 3, prepared=packed)
            total = total + tokens.reconstruction.sum() + tokens.indices.sum()
            z = z + tokens.reconstruction
        return total

    compiled = torch.compile(twice, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(6):
            z = torch.randn(2, 8, 4, 4, device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(z).clone()
            torch.testing.assert_close(found, twice(z))


def test_many_replays_give_the_same() -> None:
    graphs, w, x = Graphs(launch), weight(), torch.randn(7, 3, device="cuda")
    expected = launch(x, w, 1)[0]
    assert all(torch.equal(graphs((x,), w, 1)[0], expected) for _ in range(300))
