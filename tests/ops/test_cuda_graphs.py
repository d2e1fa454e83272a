"""CUDA graphs on a stand-in for the device layer, where stale buffers and empty graphs give wrong numbers."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import cudagraph_trees

from hitsr_fast.checks import check_finite, has_values
from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import (
    cuda_graphs,
    nearest_code,
    prepare_codebook,
    residual_quantize,
    tokenize_pyramid,
)
from hitsr_fast.ops import residual_quantize_triton as triton
from hitsr_fast.ops.cuda_graphs import Graphs
from tests.ops.fake_cuda import FakeCuda
from tests.ops.fake_memory import MIB
from tests.ops.residual_quantizer import bank


def launch(x: Tensor, y: Tensor | None, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    scaled = x * weight
    return scaled + (0 if y is None else y), scaled.new_ones(len(sizes)) * sum(sizes)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda(devices=2)
    fake.stand_in(monkeypatch)
    with fake.active():
        yield fake
    cuda_graphs._capture_stream.cache_clear()


@pytest.fixture
def weight(fake: FakeCuda) -> Tensor:
    return fake.put(torch.randn(3))


def call(graphs: Graphs, fake: FakeCuda, *arguments: Any) -> str:
    """What a call did, whose results are those of the launcher."""
    before = fake.captures, fake.replays
    found = graphs(arguments[:2], *arguments[2:])
    done = fake.captures - before[0], fake.replays - before[1]
    expected = launch(*arguments)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    return {(0, 0): "run", (1, 0): "capture", (0, 1): "replay"}[done]


def rows(fake: FakeCuda, batch: int = 2, device: int = 0) -> Tensor:
    return fake.put(torch.randn(batch, 3), device)


def test_runs_then_captures_then_replays(fake: FakeCuda, weight: Tensor) -> None:
    graphs = Graphs(launch)
    for expected in ("run", "capture", "replay", "replay"):
        assert call(graphs, fake, rows(fake), rows(fake), weight, [1, 2]) == expected
        weight.normal_()  # the same place, other values


def test_other_calls_are_of_another_kind(fake: FakeCuda, weight: Tensor) -> None:
    graphs, x, y = Graphs(launch), rows(fake), rows(fake)
    others: list[tuple[Any, ...]] = [
        (x, None, weight, [1, 2]),
        (x, None, weight, [2, 1]),
        (x, y, weight, [1, 2]),
        (x[:1], None, weight, [1, 2]),
        (x.double(), None, weight, [1, 2]),
        (x.T.contiguous().T, None, weight, [1, 2]),
        (x, None, weight.clone(), [1, 2]),
        (x, None, weight[:1], [1, 2]),
    ]
    for expected in ("run", "capture", "replay"):
        for arguments in others:
            assert call(graphs, fake, *arguments) == expected
    with use_backend("reference"):  # what was captured took another one
        assert call(graphs, fake, *others[0]) == "run"


def test_what_was_not_called_for_longest_is_forgotten(fake: FakeCuda, weight: Tensor) -> None:
    graphs, x = Graphs(launch, capacity=2), rows(fake)
    for size, expected in [
        (1, "run"),
        (2, "run"),
        (1, "capture"),
        (3, "run"),
        (1, "replay"),
        (2, "run"),
        (3, "run"),
    ]:
        assert call(graphs, fake, x, None, weight, [size]) == expected


def test_off_the_gpu_calls_just_run(fake: FakeCuda) -> None:
    graphs, x = Graphs(launch), torch.from_numpy(torch.ones(2, 3).numpy())
    for _ in range(3):
        assert graphs((x, None), x[0], [1])[1].item() == 1
    assert fake.captures == 0 and not graphs._kinds


def test_each_device_has_its_graphs(fake: FakeCuda) -> None:
    """Whatever the current one is, also where PyTorch has captured on another one before."""
    with fake.graph(fake.CUDAGraph()):
        torch.ones(3) + 1
    graphs, weights = Graphs(launch), [fake.put(torch.randn(3), device) for device in range(2)]
    for expected in ("run", "capture", "replay", "replay"):
        for device in (1, 0):
            found = call(graphs, fake, rows(fake, device=device), None, weights[device], [1])
            assert found == expected and fake.current_device() == 0
    with fake.device(1):
        assert call(graphs, fake, rows(fake, device=0), None, weights[0], [1]) == "replay"
    assert 0 < fake.reserved(0) == fake.reserved(1)
    assert [cuda_graphs._capture_stream(device).device_index for device in range(2)] == [0, 1]


@pytest.mark.parametrize("device", [0, 1])
def test_streams_take_turns(device: int, fake: FakeCuda) -> None:
    """One graph serves all; its buffers are overwritten only after the last replay has been copied out.

    The streams of the tensors' device count, whichever device is the current one.
    """
    graphs, done, weight = Graphs(launch), [], fake.put(torch.randn(3), device)
    streams = [fake.default_stream(device), fake.Stream(device), fake.Stream(device)]
    for _ in range(3):
        for stream in streams:
            with fake.stream(stream), fake.device(0):
                arguments = rows(fake, device=device), rows(fake, device=device), weight, [1]
                done.append((arguments, graphs(arguments[:2], *arguments[2:])))
    assert (fake.captures, fake.replays) == (1, 7)
    fake.synchronize(device)
    for arguments, found in done:
        assert all(torch.equal(one, other) for one, other in zip(found, launch(*arguments), strict=True))


def test_what_a_forgotten_graph_reads_is_not_given_away(fake: FakeCuda, weight: Tensor) -> None:
    """It may still run on another stream."""
    graphs, x, other = Graphs(launch, capacity=1), rows(fake), fake.Stream()
    for stream in (fake.current_stream(), fake.current_stream(), other):
        with fake.stream(stream):
            graphs((x, x), weight, [1])
    assert (fake.captures, fake.replays) == (1, 1)
    graphs((x, x), weight, [2])
    free = [torch.zeros(2, 3) for _ in range(8)]
    assert all(tensor.eq(0).all() for tensor in free)


@pytest.mark.parametrize("modes", ["in", "no", "grad"])
def test_buffers_outlive_the_mode_that_they_were_made_in(fake: FakeCuda, modes: str) -> None:
    order = {
        "in": [torch.inference_mode, torch.no_grad, torch.enable_grad],
        "no": [torch.no_grad, torch.inference_mode, torch.enable_grad],
        "grad": [torch.enable_grad, torch.inference_mode, torch.no_grad],
    }[modes]
    graphs, weight = Graphs(launch), fake.put(torch.randn(3))
    for mode in (order[0], *order):
        for _ in range(2):
            with mode():
                x = rows(fake).requires_grad_(mode is torch.enable_grad)
                found = graphs((x, None), weight, [1])
                assert torch.equal(found[0], launch(x, None, weight, [1])[0])
    assert (fake.captures, fake.replays) == (1, 6)
    assert not any(tensor.requires_grad for tensor in found)


def test_threads_capture_in_turn(fake: FakeCuda, weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cudagraph_trees, "graph_capture_lock", raising=False)
    together = threading.Barrier(2, timeout=60)

    def slow(x: Tensor, y: Tensor | None, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        if fake.is_current_stream_capturing():
            time.sleep(0.2)
        else:
            together.wait()  # before the captures, too
        return launch(x, y, weight, sizes)

    def work() -> tuple[bool, ...]:
        graphs, inputs = Graphs(slow), [rows(fake) for _ in range(4)]
        found = [graphs((x, None), weight, [1])[0] for x in inputs]
        expected = [launch(x, None, weight, [1])[0] for x in inputs]
        return graphs._warned, *map(torch.equal, found, expected)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        joins = [fake.run_in_thread(work) for _ in range(2)]
        assert [join() for join in joins] == [(False, *[True] * 4)] * 2
    assert fake.captures == 2


def looks(x: Tensor, y: Tensor | None, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    if sizes == [7]:
        x.sum().item()
    return launch(x, y, weight, sizes)


def test_what_cannot_be_captured_runs_and_says_so_once(fake: FakeCuda, weight: Tensor) -> None:
    graphs, stream = Graphs(looks), fake.current_stream()
    for expected in ("run", "capture", "replay"):
        assert call(graphs, fake, rows(fake), None, weight, [1]) == expected
    assert call(graphs, fake, rows(fake), None, weight, [7]) == "run"
    with pytest.warns(RuntimeWarning, match="graph of looks could not be captured .*not permitted") as caught:
        assert call(graphs, fake, rows(fake), None, weight, [7]) == "run"
    assert len(caught) == 1 and caught[0].filename == __file__
    assert fake.current_stream() is stream
    attempts = fake.synchronizations
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            assert call(graphs, fake, rows(fake), None, weight, [7]) == "run"
        assert fake.synchronizations == attempts
        assert call(graphs, fake, rows(fake), None, weight, [1]) == "replay"
        done = [call(graphs, fake, rows(fake), None, weight, [2]) for _ in range(4)]
        assert done == ["run", "run", "capture", "replay"]  # a capture that failed has not paid


def test_an_error_of_the_launcher_is_no_failed_capture(fake: FakeCuda, weight: Tensor) -> None:
    def wrong(x: Tensor) -> tuple[Tensor, ...]:
        raise ValueError("x")

    graphs = Graphs(wrong)
    for _ in range(3):
        with pytest.raises(ValueError, match="x"):
            graphs((rows(fake),))


def in_between(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """Takes `size` MiB for as long as it runs."""
    spare = torch.empty(size * MIB, dtype=torch.uint8, device="meta")
    result = x * 1
    del spare
    return (result + 0 * x,)


def replayed(graphs: Graphs, x: Tensor, *rest: Any) -> None:
    for _ in range(3):
        (found,) = graphs((x,), *rest)
        assert torch.equal(found, x)


def test_kinds_share_a_pool(fake: FakeCuda) -> None:
    graphs = Graphs(in_between)
    for batch in range(1, 9):
        replayed(graphs, rows(fake, batch), 64)
    assert fake.captures == 8
    assert fake.reserved() == 66 * MIB  # once what is in between, and a segment of small tensors
    for batch in range(8, 0, -1):  # each takes the others' memory, and none the others' results
        replayed(graphs, rows(fake, batch), 64)
    assert fake.captures == 8


class Owner:
    def __init__(self) -> None:
        self.graphs = Graphs(self.walk)

    def walk(self, x: Tensor) -> tuple[Tensor, ...]:
        return in_between(x, 64)


def test_memory_goes_with_the_owner(fake: FakeCuda) -> None:
    owner = Owner()
    replayed(owner.graphs, rows(fake))
    assert fake.reserved() == 66 * MIB
    gc.collect()
    gc.disable()
    try:
        del owner
        assert fake.reserved() == 0
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="object of the method"):
        Graphs(Owner().walk)((rows(fake),))


def test_a_copy_has_captured_nothing(fake: FakeCuda) -> None:
    owner = Owner()
    replayed(owner.graphs, rows(fake))
    for other in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        assert other.graphs._launch.__self__ is other and not other.graphs._kinds
    limited = copy.copy(Graphs(launch, capacity=3, limit=4))
    assert (limited._launch, limited._capacity, limited._limit) == (launch, 3, 4)


def test_beyond_the_limit_other_kinds_are_forgotten(fake: FakeCuda) -> None:
    graphs = Graphs(in_between, limit=100 * MIB)
    x = rows(fake)
    for size in (20, 40):
        replayed(graphs, x, size)
    assert fake.captures == 2 and fake.reserved() == 62 * MIB
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphs((x,), 60)
        graphs((x,), 60)
        assert fake.captures == 3 and fake.reserved() == 0
        graphs((x,), 60)
        assert fake.captures == 4 and fake.reserved() == 62 * MIB
        replayed(graphs, x, 60)
    assert fake.captures == 4


def test_what_is_beyond_the_limit_alone_just_runs(fake: FakeCuda) -> None:
    graphs, x = Graphs(in_between, limit=50 * MIB), rows(fake)
    with pytest.warns(RuntimeWarning, match=r"in_between takes 69206016 bytes, more than 52428800") as caught:
        for _ in range(8):
            replayed(graphs, x, 64)
    assert len(caught) == 1 and fake.captures == 1 and fake.reserved() == 0


def test_by_default_graphs_take_a_quarter_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory, captured in ((256 * MIB, False), (512 * MIB, True)):
        fake = FakeCuda(memory=memory)
        fake.stand_in(monkeypatch)
        with fake.active(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graphs = Graphs(in_between)
            replayed(graphs, rows(fake), 64)
            assert (fake.reserved() > 0) == captured


def test_kinds_that_do_not_fit_together_are_not_captured_for_ever(fake: FakeCuda) -> None:
    graphs, x = Graphs(in_between, limit=100 * MIB), rows(fake)
    for _ in range(128):
        for size in (60, 61):
            graphs((x,), size)
    assert 2 < fake.captures <= 2 + 2 * 8


def test_addresses_that_change_all_the_time_are_not_captured_for_ever(fake: FakeCuda) -> None:
    """As of parts that are packed anew for each step of training, with two calls a step."""
    graphs, kept = Graphs(launch), []
    for _ in range(60):
        kept.append(fake.put(torch.randn(3)))
        for _ in range(2):
            graphs((rows(fake), None), kept[-1], [1])
    assert fake.captures <= 16 + 1
    for _ in range(4):  # what comes back is captured after all
        done = call(graphs, fake, rows(fake), None, kept[0], [1])
    assert done in ("capture", "replay")


def test_graphs_that_paid_make_room_for_free(fake: FakeCuda, weight: Tensor) -> None:
    graphs, x = Graphs(launch, capacity=1), rows(fake)
    for size in range(5):
        done = [call(graphs, fake, x, None, weight, [size]) for _ in range(2 + 16)]
        assert done == ["run", "capture", *["replay"] * 16]


def test_within_a_capture_of_somebody_else_calls_just_run(fake: FakeCuda, weight: Tensor) -> None:
    graphs, x = Graphs(launch), rows(fake)
    assert [call(graphs, fake, x, None, weight, [1]) for _ in range(3)] == ["run", "capture", "replay"]
    outer, side = fake.CUDAGraph(), fake.Stream()
    with fake.graph(outer, stream=side):
        results = graphs((x, None), weight, [1])
    x.normal_()
    outer.replay()
    assert torch.equal(results[0], launch(x, None, weight, [1])[0])
    assert (fake.captures, fake.replays) == (2, 2)


def test_runs_that_the_compiler_captures_later_are_not_captured(
    fake: FakeCuda, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torch.compile(mode="reduce-overhead")` first runs what it compiled, on its own stream and pool."""
    graphs, x, theirs = Graphs(launch), rows(fake), fake.Stream()
    manager = SimpleNamespace(stream=theirs)
    containers = {0: SimpleNamespace(tree_manager=None), 1: SimpleNamespace(tree_manager=manager)}
    monkeypatch.setattr(cudagraph_trees.local, "tree_manager_containers", containers)
    assert call(graphs, fake, x, None, weight, [1]) == "run"
    containers[0].tree_manager = manager
    theirs.wait_stream(fake.current_stream())
    with fake.stream(theirs):
        assert [call(graphs, fake, x, None, weight, [1]) for _ in range(3)] == ["run"] * 3
    assert call(graphs, fake, x, None, weight, [1]) == "capture"
    theirs.wait_stream(fake.current_stream())
    with fake.stream(theirs):
        assert call(graphs, fake, x, None, weight, [1]) == "run"


def test_while_the_compiler_captures_nothing_else_does(fake: FakeCuda, weight: Tensor) -> None:
    if not hasattr(cudagraph_trees, "graph_capture_lock"):
        pytest.skip("this PyTorch's compiler has no lock for captures")
    graphs, x = Graphs(launch), rows(fake)
    with cudagraph_trees.graph_capture_lock:
        assert [call(graphs, fake, x, None, weight, [1]) for _ in range(3)] == ["run"] * 3
    assert call(graphs, fake, x, None, weight, [1]) == "capture"
    assert not cudagraph_trees.graph_capture_lock.locked()


def test_the_compiler_has_what_its_captures_are_known_by() -> None:
    assert isinstance(cudagraph_trees.local.tree_manager_containers, dict)
    assert "tree_manager" in cudagraph_trees.TreeManagerContainer(0).__dict__
    assert "stream" in cudagraph_trees.CUDAGraphTreeManager.__init__.__code__.co_names


def test_values_are_not_looked_at_while_they_are_captured(fake: FakeCuda) -> None:
    x = fake.put(torch.full((4, 3), torch.nan), device=1)
    with pytest.raises(ValueError, match="expected finite values"):
        check_finite("x", x)
    assert has_values(x)
    with fake.device(1), fake.graph(fake.CUDAGraph(), stream=fake.Stream()):
        check_finite("x", x)
        prepare_codebook(x)
        assert not has_values(x) and has_values(fake.put(torch.ones(1), 0))
        with fake.device(0):
            assert not has_values(x)


@pytest.mark.parametrize("op", ["nearest_code", "residual_quantize", "tokenize_pyramid"])
def test_unprepared_ops_are_captured(op: str, fake: FakeCuda) -> None:
    """And the codebook's values, which a capture cannot read, are looked at in other calls only."""
    quantizer = [fake.put(tensor) for tensor in bank(dtype=torch.float32)]
    z, graph = fake.put(torch.randn(2, 3, 4, 4)), fake.CUDAGraph()
    scales = [(1, 1), (2, 2), (4, 4)]

    def run() -> Tensor:
        if op == "nearest_code":
            return nearest_code(z, quantizer[0])
        if op == "residual_quantize":
            return residual_quantize(z, *quantizer, scales=scales, phi_index=[0, 0, 0]).indices
        return tokenize_pyramid(
            [z], *quantizer, scales=scales, target_steps=[3], phi_index=[[0, 0, 0]]
        ).indices

    with fake.graph(graph, stream=fake.Stream()):
        results = run()
    z.normal_()
    graph.replay()
    assert torch.equal(results, run())
    quantizer[0][0, 0] = torch.nan
    with fake.graph(fake.CUDAGraph(), stream=fake.Stream()):
        run()
    with pytest.raises(ValueError, match="codebook: expected finite values"):
        run()


def test_which_calls_are_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches, prepared or not: what packs the codebook is part of the graph."""
    ways: list[str] = []
    monkeypatch.setattr(triton, "_quantize", lambda *arguments: ways.append("kernels"))
    monkeypatch.setattr(triton, "_graphs", lambda given, *rest: ways.append("graph"))

    def way(batch: int, side: int = 32, layout: str = "triton") -> str:
        z = torch.zeros(batch, 3, side, side)
        triton.residual_quantize_triton(
            z, *bank(dtype=torch.float32), [], layout, [1, 1], [0], 0.5, None, "l2", False, False
        )
        return ways.pop()

    assert way(1) == way(8) == way(2, 64) == way(1, layout="") == "graph"
    assert way(9) == way(0) == way(8, 33) == "kernels"
