"""CUDA graphs of calls whose many small kernels take less time than their launches.

What is known of PyTorch and CUDA, and held to here:

- A graph belongs to a device, and so does a stream. Left alone, PyTorch captures on one stream of its own,
  which is on the first device that captured: on another the graph is empty, in silence.
- One capture at a time in a process; a synchronize of any thread breaks one that is underway.
- Graphs of one memory pool use the same addresses for what they need in between and for what they return.
  So replays of one object never overlap: threads take turns, streams wait for each other, and results are
  copied out before the next replay.
- Memory of a pool comes back when the last of its graphs is gone, and not before; after that, and after a
  capture that failed, the pool cannot be captured to.
- PyTorch's compiler captures as well, after runs in its own pool: nothing may be captured within those.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, cuda

from hitsr_fast.checks import has_values
from hitsr_fast.dispatch import forced_backend

Given = Sequence["Tensor | None"]
Results = tuple[Tensor, ...]
Launch = Callable[..., Results]

_WORTHWHILE = 16  # replays that pay for a capture
_captures = threading.Lock()
_failed: list[cuda.CUDAGraph] = []  # an older PyTorch's allocator goes on asking them what is theirs


class _Captured(NamedTuple):
    """A graph, what it reads and what it writes."""

    graph: cuda.CUDAGraph
    buffers: list[Tensor | None]
    results: Results


class _Kind:
    """Calls that one graph can stand for."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.calls = 0  # since it was last forgotten
        self.patience = 0  # after how many of them it was captured
        self.replays = 0
        self.refused = False
        self.captured: _Captured | None = None


class _Memory:
    """The pool of an object's graphs on a device, and the last use of it."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.used: tuple[cuda.Stream, cuda.Event] | None = None

    def bytes(self) -> int:
        """What the pool has taken from the device."""
        return sum(segment["total_size"] for segment in cuda.memory_snapshot(self.pool))


class Graphs:
    """The calls of a launcher, captured as they come back and replayed from then on.

    The first call of a kind just runs, which compiles its kernels; the second is captured; later ones copy
    in, replay and copy out. Calls are of one kind if device and forced backend are the same, what is copied
    has the same shapes, and everything else is the same, tensors by address: a graph reads at an address
    whatever lies there at the time, so weights may change between calls.

    Calls off the GPU, traced calls, and calls within somebody else's capture just run. So do, with one
    warning, those of a kind whose capture failed or takes more memory than `limit` by itself.

    Args:
        launch: takes what is copied, a tensor first, and then everything else; it waits for nothing. Of a
            method only its object's owner keeps the object.
        capacity: kinds to remember. The one that was not called for longest is forgotten first.
        limit: bytes for the graphs of a device, a quarter of its memory by default. The call that goes beyond
            has all other kinds forgotten, and their memory is given back.

    A capture costs as much as many replays. When graphs are forgotten that were hardly replayed, as where
    addresses change all the time, calls have to come back twice as often before they are captured.

    A copy or a pickle has captured nothing.
    """

    def __init__(self, launch: Launch, capacity: int = 16, limit: int | None = None) -> None:
        # A strong reference to a method would be a cycle, and keep the memory until it is collected.
        self._reference = weakref.WeakMethod(launch) if inspect.ismethod(launch) else lambda: launch
        self._capacity, self._limit = capacity, limit
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self._memories: dict[int, _Memory] = {}
        self._patience = 1
        self._warned = False
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self._launch, self._capacity, self._limit)

    @property
    def _launch(self) -> Launch:
        launch = self._reference()
        if launch is None:
            raise ReferenceError("Graphs: the object of the method to launch is gone")
        return launch

    def __call__(self, given: Given, *rest: Any) -> Results:
        """What `launch(*given, *rest)` returns; `given` is copied."""
        first, launch = given[0], self._launch
        assert first is not None
        guard = cuda.device_of(first)
        if guard.idx < 0 or not has_values(first):
            return launch(*given, *rest)
        with guard:
            if capturing():
                return launch(*given, *rest)
            with self._lock:
                kind = self._kind(guard.idx, given, rest)
                if kind.captured is not None:
                    return self._replay(kind, kind.captured, given)
                if kind.calls > self._patience and not kind.refused:
                    return self._capture(kind, launch, given, rest)
            return launch(*given, *rest)

    def _kind(self, device: int, given: Given, rest: Sequence[Any]) -> _Kind:
        """That of a call, which counts."""
        key = device, forced_backend(), tuple(map(_shape, given)), tuple(map(_identity, rest))
        kind = self._kinds.setdefault(key, _Kind(device))
        kind.calls += 1
        self._kinds.move_to_end(key)
        if len(self._kinds) > self._capacity:
            self._forget([self._kinds.popitem(last=False)[1]])
        return kind

    def _forget(self, kinds: Sequence[_Kind]) -> None:
        """Let go of their graphs, all on one device."""
        captured = [kind for kind in kinds if kind.captured is not None]
        for kind in captured:
            paid = kind.replays >= _WORTHWHILE
            self._patience = 1 if paid else max(self._patience, 2 * kind.patience)
            kind.captured, kind.calls, kind.replays = None, 0, 0
        if captured and not self._captured(captured[0].device):
            self._memory(captured[0].device).pool = None

    def _captured(self, device: int) -> list[_Kind]:
        return [kind for kind in self._kinds.values() if kind.device == device and kind.captured is not None]

    def _replay(self, kind: _Kind, captured: _Captured, given: Given) -> Results:
        memory, stream = self._memory(kind.device), cuda.current_stream()
        if memory.used is None:
            memory.used = stream, cuda.Event()
        last, event = memory.used
        if last != stream:
            stream.wait_event(event)
        with torch.no_grad():
            for buffer, value in zip(captured.buffers, given, strict=True):
                if buffer is not None and value is not None:
                    buffer.copy_(value)
            captured.graph.replay()
            results = tuple(result.clone() for result in captured.results)
        event.record(stream)
        memory.used = stream, event
        kind.replays += 1
        return results

    def _capture(self, kind: _Kind, launch: Launch, given: Given, rest: Sequence[Any]) -> Results:
        """What a call returns that is captured as well."""
        copies = [None if tensor is None else tensor.clone() for tensor in given]
        results = launch(*copies, *rest)  # compiles what aligned addresses ask for: not while capturing
        with _alone() as alone:
            if alone:
                self._record(kind, launch, given, rest)
        return results

    def _record(self, kind: _Kind, launch: Launch, given: Given, rest: Sequence[Any]) -> None:
        memory, graph = self._memory(kind.device), cuda.CUDAGraph()
        if memory.pool is None:
            memory.pool = cuda.graph_pool_handle()
        try:
            # After a failure PyTorch leaves the stream of the capture as the current one: hence the first.
            # Buffers of inference mode could not be written to outside it.
            with (
                cuda.stream(cuda.current_stream()),
                torch.inference_mode(False),
                torch.no_grad(),
                cuda.graph(
                    graph,
                    pool=memory.pool,
                    stream=_capture_stream(kind.device),
                    capture_error_mode="thread_local",
                ),
            ):
                # In the pool, too, where only what is ordered can reach them.
                buffers = [None if tensor is None else torch.empty_like(tensor) for tensor in given]
                results = launch(*buffers, *rest)
        except RuntimeError as error:
            graph.reset()
            _failed.append(graph)
            memory.pool = None
            first = error.__context__ or error  # the end of a capture fails as well
            self._refuse(kind, f"could not be captured ({str(first).strip().splitlines()[0]})")
            return
        kind.captured, kind.patience = _Captured(graph, buffers, results), self._patience
        limit = self._limit
        if limit is None:
            limit = cuda.get_device_properties(kind.device).total_memory // 4
        if (size := memory.bytes()) > limit:
            self._make_room(kind, f"takes {size} bytes, more than {limit}")

    def _make_room(self, kind: _Kind, why: str) -> None:
        """Give the pool back. Its last kind may be captured again, in another one, if it was not alone."""
        others = [other for other in self._captured(kind.device) if other is not kind]
        kind.captured = None
        self._memory(kind.device).pool = None
        self._forget(others)
        if not others:
            self._refuse(kind, why)

    def _refuse(self, kind: _Kind, why: str) -> None:
        """Have a kind's calls just run from now on; the first time, say so."""
        kind.refused = True
        self._patience *= 2
        if not self._warned:
            self._warned = True
            name = getattr(self._launch, "__qualname__", "launch")
            message = f"a CUDA graph of {name} {why}: such calls run without one, which is slower"
            warnings.warn(message, RuntimeWarning, stacklevel=5)

    def _memory(self, device: int) -> _Memory:
        return self._memories.setdefault(device, _Memory())


def capturing() -> bool:
    """Whether kernels on the current stream are captured, or run to be captured, by somebody else."""
    if cuda.is_current_stream_capturing():
        return True
    containers = getattr(getattr(_trees(), "local", None), "tree_manager_containers", {})
    manager = getattr(containers.get(cuda.current_device()), "tree_manager", None)
    return manager is not None and bool(manager.stream == cuda.current_stream())


@contextmanager
def _alone() -> Iterator[bool]:
    """Keeps other captures of the process away, the compiler's too; False where that one is busy."""
    compiler = getattr(_trees(), "graph_capture_lock", None)
    with _captures:
        # Not waiting: this thread may be what the compiler is busy with.
        if compiler is not None and not compiler.acquire(blocking=False):
            yield False
            return
        try:
            yield True
        finally:
            if compiler is not None:
                compiler.release()


def _trees() -> Any:
    """PyTorch's module that captures what `torch.compile` compiled, once it is in use."""
    return sys.modules.get("torch._inductor.cudagraph_trees")


@functools.cache
def _capture_stream(device: int) -> cuda.Stream:
    """One for all captures on a device: memory of a pool is used again on the stream that it was asked on."""
    with cuda.device(device):
        return cuda.Stream()


def _shape(tensor: Tensor | None) -> Hashable:
    return tensor if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype)


def _identity(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.data_ptr(), _shape(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_identity, value))
    hashable: Hashable = value
    return hashable
