"""The stand-in for `torch.cuda` has the rules that graphs have to live with."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.fake_cuda import FakeCuda
from tests.ops.fake_memory import MIB, RaceError


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    fake = FakeCuda(devices=2)
    with fake.active():
        yield fake


def double(x: Tensor) -> Tensor:
    y = x * 2
    return y + torch.zeros_like(y)


def captured(fake: FakeCuda, x: Tensor, pool: Any = None, stream: Any = None) -> tuple[Any, Tensor]:
    graph = fake.CUDAGraph()
    with fake.graph(graph, pool=pool, stream=stream):
        result = double(x)
    return graph, result


def test_a_graph_runs_when_it_is_replayed_on_what_lies_there(fake: FakeCuda) -> None:
    x = fake.put(torch.ones(3))
    graph, result = captured(fake, x)
    assert result.isnan().all()
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert torch.equal(result, torch.full((3,), 2 * value))


def test_recording_writes_nothing(fake: FakeCuda) -> None:
    x, graph = fake.put(torch.ones(3)), fake.CUDAGraph()
    with fake.graph(graph):
        x[1:] += 1
    assert x.tolist() == [1, 1, 1]
    graph.replay()
    graph.replay()
    assert x.tolist() == [1, 3, 3]


def test_the_default_stream_of_captures_is_one_of_the_first_device(fake: FakeCuda) -> None:
    captured(fake, fake.put(torch.ones(3)))
    x = fake.put(torch.ones(3), device=1)
    with fake.device(1):
        graph, result = captured(fake, x)
        x.fill_(4)
        graph.replay()
        assert result.tolist() == [2, 2, 2]  # empty, in silence
        graph, result = captured(fake, x, stream=fake.Stream())
        graph.replay()
        assert result.tolist() == [8, 8, 8]


def test_addresses_come_back_and_bytes_are_counted(fake: FakeCuda) -> None:
    one = torch.ones(MIB)  # 4 MiB
    address = one.data_ptr()
    del one
    assert torch.ones(MIB).data_ptr() == address
    assert fake.reserved() == 0
    x, pool, stream = fake.put(torch.ones(MIB)), fake.graph_pool_handle(), fake.Stream()
    graphs = [captured(fake, x, pool, stream) for _ in range(3)]
    # Of each the result, and once what is in between; a segment holds five blocks of 4 MiB.
    assert fake.reserved() == sum(s["total_size"] for s in fake.memory_snapshot(pool)) == 20 * MIB
    private = [captured(fake, x) for _ in range(3)]
    assert fake.reserved() == 80 * MIB
    del graphs, private
    gc.collect()
    assert fake.reserved() == 0
    with pytest.raises(RuntimeError, match="use_count"):
        captured(fake, x, pool, stream)


def test_meta_tensors_are_counted(fake: FakeCuda) -> None:
    x = torch.empty(2**30, device="meta")
    graph, result = captured(fake, x)
    assert result.shape == x.shape and fake.reserved() == 3 * 2**32
    graph.replay()


def test_graphs_of_one_pool_take_each_others_memory(fake: FakeCuda) -> None:
    x, pool, stream = fake.put(torch.ones(3)), fake.graph_pool_handle(), fake.Stream()
    first, kept = captured(fake, x, pool, stream)
    second, other = captured(fake, x, pool, stream)
    first.replay()
    before = kept.clone()
    second.replay()
    assert before.tolist() == kept.tolist() == other.tolist() == [2, 2, 2]
    first.replay()
    assert other.isnan().sum() == 0 and kept.data_ptr() != other.data_ptr()


def test_one_capture_at_a_time(fake: FakeCuda) -> None:
    x = fake.put(torch.ones(3))
    with (
        pytest.raises(RuntimeError, match="invalidated"),
        fake.graph(fake.CUDAGraph()),
        pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
    ):
        fake.run_in_thread(lambda: captured(fake, x))()


@pytest.mark.parametrize("look", [lambda x: x[0].item(), lambda x: x.nonzero(), lambda x: torch.equal(x, x)])
def test_a_look_at_a_value_breaks_a_capture_and_leaves_its_traces(fake: FakeCuda, look: Any) -> None:
    x, pool, before = fake.put(torch.ones(3)), fake.graph_pool_handle(), fake.current_stream()
    with pytest.raises(RuntimeError, match="capture invalidated"), fake.graph(fake.CUDAGraph(), pool=pool):
        look(x)
    assert fake.current_stream() is not before
    with pytest.raises(RuntimeError, match="already recording"):
        captured(fake, x, pool)


def test_streams_need_an_order(fake: FakeCuda) -> None:
    x, other = fake.put(torch.ones(3)), fake.Stream()
    x += 1
    with fake.stream(other), pytest.raises(RaceError, match="reads what stream 0 wrote"):
        x.clone()
    other.wait_stream(fake.current_stream())
    with fake.stream(other):
        x.clone()
    with pytest.raises(RaceError, match="writes what stream 2 read"):
        x += 1
    fake.current_stream().wait_event(other.record_event())
    x += 1


def test_devices_do_not_mix(fake: FakeCuda) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        fake.put(torch.ones(3)) + fake.put(torch.ones(3), device=1)
    assert fake.device_of(fake.put(torch.ones(3), device=1)).idx == 1
    assert fake.device_of(torch.from_numpy(torch.ones(3).numpy())).idx == -1


def test_what_was_made_in_inference_mode_stays_so(fake: FakeCuda) -> None:
    with torch.inference_mode():
        x = fake.put(torch.ones(3)).clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        x.fill_(2)
