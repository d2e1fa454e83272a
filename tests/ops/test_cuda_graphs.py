"""Which calls are captured and which are replayed, with a capture that needs no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hitsr_fast.ops import cuda_graphs
from hitsr_fast.ops import residual_quantize_triton as triton
from hitsr_fast.ops.cuda_graphs import Graphs
from tests.ops.residual_quantizer import bank


def launch(x: Tensor, y: Tensor | None, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return x * weight + (0 if y is None else y), torch.tensor(list(sizes))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens: "run", "capture", "replay". The capture is a call with everything but `given` bound."""
    events: list[str] = []

    def capture(launch: Callable[..., Any], given: Any, rest: Any) -> Callable[..., Any]:
        events.append("capture")

        def replay(values: Any) -> Any:
            events.append("replay")
            return launch(*values, *rest)

        return replay

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "_stream", lambda: stream[0])
    stream[0] = 0
    return events


stream = [0]


def call(graphs: Graphs, log: list[str], *arguments: Any) -> list[str]:
    """The events of a call, whose results are those of the launcher."""
    before = len(log)
    found, expected = graphs(arguments[:2], *arguments[2:]), launch(*arguments)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    return log[before:] or ["run"]


def test_runs_then_captures_then_replays(log: list[str]) -> None:
    graphs, weight = Graphs(launch), torch.randn(3)
    for expected in (["run"], ["capture", "replay"], ["replay"], ["replay"]):
        assert call(graphs, log, torch.randn(2, 3), None, weight, [1, 2]) == expected
        weight.normal_()  # the same place, other values


def test_other_calls_are_of_another_kind(log: list[str]) -> None:
    graphs, x, y, weight = Graphs(launch), torch.randn(2, 3), torch.randn(2, 3), torch.randn(3)
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
    for arguments in others:
        assert call(graphs, log, *arguments) == ["run"]
    for arguments in others:
        assert call(graphs, log, *arguments) == ["capture", "replay"]
    stream[0] = 1
    assert call(graphs, log, *others[0]) == ["run"]


def test_what_was_not_called_for_longest_is_forgotten(log: list[str]) -> None:
    graphs, x, weight = Graphs(launch, capacity=2), torch.randn(2, 3), torch.randn(3)
    for size, expected in [
        (1, "run"),
        (2, "run"),
        (1, "capture"),
        (3, "run"),
        (1, "replay"),
        (2, "run"),
        (3, "run"),
    ]:
        assert call(graphs, log, x, None, weight, [size])[0] == expected


class OnGpu(Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


def test_which_calls_are_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches on a GPU with a packed codebook, unless the caller captures."""
    ways: list[str] = []
    monkeypatch.setattr(triton, "_quantize", lambda *arguments: ways.append("kernels"))
    monkeypatch.setattr(triton, "_graphs", lambda given, *rest: ways.append("graph"))
    monkeypatch.setattr(triton, "capturing", lambda: outer)
    outer = False

    def way(batch: int, side: int = 32, layout: str = "triton", on_gpu: bool = True) -> str:
        z = torch.zeros(batch, 3, side, side)
        z = z.as_subclass(OnGpu) if on_gpu else z
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: torch.no_grad())
        triton.residual_quantize_triton(
            z, *bank(dtype=torch.float32), [], layout, [1, 1], [0], 0.5, None, "l2", False, False
        )
        return ways.pop()

    assert way(1) == way(8) == way(2, 64) == "graph"
    assert way(9) == way(0) == way(8, 33) == way(1, layout="") == way(1, on_gpu=False) == "kernels"
    outer = True
    assert way(1) == "kernels"
