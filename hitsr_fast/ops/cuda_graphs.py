"""CUDA graphs of calls whose many small kernels take less time than their launches."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

Given = Sequence["Tensor | None"]
Results = tuple[Tensor, ...]


class Graphs:
    """The calls of a launcher, captured as they come back and replayed from then on.

    The first call of a kind just runs, which compiles its kernels; the second is captured; later ones copy
    in, replay and copy out. Calls are of one kind if what is copied has the same shapes, if everything else
    is the same, tensors by address, and if they run on the same stream: a graph reads at an address whatever
    lies there at the time, so weights may change between calls.

    Args:
        launch: takes what is copied and then everything else; it waits for nothing.
        capacity: kinds to remember. The one that was not called for longest is forgotten first.

    A copy or a pickle has captured nothing.
    """

    def __init__(self, launch: Callable[..., Results], capacity: int = 16) -> None:
        self._launch, self._capacity = launch, capacity
        self._kinds: OrderedDict[Hashable, Callable[[Given], Results] | None] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self._launch, self._capacity)

    def __call__(self, given: Given, *rest: Any) -> Results:
        """What `launch(*given, *rest)` returns; `given` is copied."""
        kind = _stream(), tuple(map(_shape, given)), tuple(map(_identity, rest))
        with self._lock:  # threads may share a stream, and so a graph and its buffers
            if kind not in self._kinds:
                self._kinds[kind] = None
                if len(self._kinds) > self._capacity:
                    self._kinds.popitem(last=False)
                return self._launch(*given, *rest)
            self._kinds.move_to_end(kind)
            replay = self._kinds[kind]
            if replay is None:
                replay = self._kinds[kind] = capture(self._launch, given, rest)
            return replay(given)


def capture(launch: Callable[..., Results], given: Given, rest: Sequence[Any]) -> Callable[[Given], Results]:
    """Capture `launch(*given, *rest)`; the result does the same for other values of `given`."""
    buffers = [None if tensor is None else tensor.clone() for tensor in given]
    launch(*buffers, *rest)  # compiles what the buffers' addresses may ask for: not while capturing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = launch(*buffers, *rest)

    def replay(values: Given) -> Results:
        for buffer, value in zip(buffers, values, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value)
        graph.replay()
        return tuple(result.clone() for result in results)

    return replay


def capturing() -> bool:
    """Whether the caller is capturing a graph of its own, which the kernels then belong to."""
    return torch.cuda.is_current_stream_capturing()


def _stream() -> Hashable:
    stream = torch.cuda.current_stream()
    return stream.device_index, stream.cuda_stream


def _shape(tensor: Tensor | None) -> Hashable:
    return tensor if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def _identity(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.data_ptr(), _shape(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_identity, value))
    hashable: Hashable = value
    return hashable
