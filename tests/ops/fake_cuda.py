"""A stand-in for what CUDA graphs ask of `torch.cuda`, with its rules: on CPU tensors, or meta ones to count.

    fake = FakeCuda(devices=2)
    fake.stand_in(monkeypatch)
    with fake.active():
        x = fake.put(torch.randn(4), device=1)

While it is `active` in a thread, each ATen call (or whole op of this package) is a kernel on the device of
its tensors, on that device's current stream. Memory comes out of pools that count their bytes as PyTorch's
caching allocator does, so that an address is used again once nothing holds it. Calls on a capturing stream
are recorded, and after the capture all of its pool is NaN and all other memory is as before; a replay runs
them on the same addresses. So a stale buffer, a missing copy or an empty graph shows as wrong numbers. Beyond
that the layer knows these rules:

- a device has streams of its own, and a thread a current device and a current stream for each;
- `graph` without a stream captures on one stream for the process, made on the device that first captured;
- one capture at a time: another one, a synchronize or a look at a value while capturing fails, and so does
  the capture that was underway; after a failure the allocator still takes the pool for captured to, and the
  current stream is still the one of the capture;
- a pool whose last graph is gone cannot be captured to again;
- two kernels on different streams that touch the same memory, one of them writing, have to be ordered by
  events, or `RaceError` is raised.

Tensors from elsewhere belong to the device on which they are first used with others. `reserved` counts bytes.
What an op allocates inside is not seen.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only, tree_structure, tree_unflatten

from hitsr_fast import checks
from hitsr_fast.ops import cuda_graphs
from tests.ops.fake_memory import Event, Place, Pool, Segment, Stream, see

Touched = list[tuple["tuple[Place, int, int] | None", bool]]
_LOOKS = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "_unique2", "bincount"}


class CUDAGraph:
    """What was recorded: calls, and the memory that they read and write."""

    def __init__(self) -> None:
        self.calls: list[Callable[[Stream], None]] = []
        self.stream: Stream | None = None  # of the capture; None until it has ended well
        self.pool = (0, 0)
        self.restore: list[tuple[Tensor, Tensor]] = []
        self.invalid = ""

    def reset(self) -> None:
        self.calls, self.stream = [], None

    def replay(self) -> None:
        assert self.stream is not None, "replay without a preceding successful capture"
        fake = self.stream._fake
        stream = fake.current_stream(self.stream.device_index)
        with fake.lock, _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            fake.replays += 1
            for call in self.calls:
                call(stream)


class FakeCuda:
    """Stands for the module `torch.cuda`.

    Args:
        devices: how many.
        memory: bytes of each.
    """

    CUDAGraph, Event = CUDAGraph, Event

    def __init__(self, devices: int = 1, memory: int = 80 * 2**30) -> None:
        self.lock = threading.RLock()
        self.host: dict[Stream, int] = {}
        self.captures = self.replays = self.synchronizations = 0
        self.underway: list[CUDAGraph] = []
        self.fails: str | None = None  # a capture that goes on from here fails for this reason
        self._memory, self._streams = memory, 0
        self._default = [self._stream(device) for device in range(devices)]
        self._pools = [{(0, 0): Pool(device)} for device in range(devices)]
        self._recording: list[set[tuple[int, int]]] = [set() for _ in range(devices)]
        self._elsewhere: dict[int, tuple[StorageWeakRef, Place]] = {}
        self._local = threading.local()
        self._handles = 0
        self._capture_stream: Stream | None = None
        self.memory = SimpleNamespace(
            _cuda_endAllocateToPool=self._end_allocate, _cuda_releasePool=self._release
        )

    # What tests use.

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For `torch.cuda`, where graphs and checks ask it."""
        monkeypatch.setattr(cuda_graphs, "cuda", self)
        monkeypatch.setattr(checks, "cuda", self)
        cuda_graphs._capture_stream.cache_clear()

    def active(self) -> TorchDispatchMode:
        """Calls in this context, of this thread, are kernels."""
        return _Kernels(self)

    def put(self, tensor: Tensor, device: int = 0) -> Tensor:
        """A copy on a device."""
        with self.device(device), _disable_current_modes():
            return self._placed(tensor, self.current_stream(), fill=True)

    def run_in_thread(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Starts a thread that is active; the result waits for it, and returns or raises what it did."""
        found: list[Any] = []

        def run() -> None:
            try:
                with self.active():
                    found.append(function())
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()

        def join() -> Any:
            thread.join(60)
            assert found, "still running: a deadlock?"
            if isinstance(found[0], BaseException):
                raise found[0]
            return found[0]

        return join

    def reserved(self, device: int = 0) -> int:
        """Bytes of the pools of graphs, but for those of which nothing is left."""
        self._sweep(device)
        return sum(pool.reserved() for key, pool in self._pools[device].items() if key != (0, 0))

    # As in torch.cuda.

    def current_device(self) -> int:
        return getattr(self._local, "device", 0)

    def current_stream(self, device: int | None = None) -> Stream:
        device = self.current_device() if device is None else device
        return self._current().get(device, self._default[device])

    def default_stream(self, device: int | None = None) -> Stream:
        return self._default[self.current_device() if device is None else device]

    def Stream(self, device: int | None = None) -> Stream:
        return self._stream(self.current_device() if device is None else device)

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self._local.device = self.current_device(), index
        try:
            yield
        finally:
            self._local.device = before

    def device_of(self, tensor: Tensor) -> Any:
        place = self._place(tensor)
        return _Guard(self, -1 if place is None else place.device)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        # On its device, as set_stream does.
        leave = self._enter(stream)
        try:
            yield
        finally:
            leave()

    @contextmanager
    def graph(
        self,
        graph: CUDAGraph,
        pool: tuple[int, int] | None = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
    ) -> Iterator[None]:
        if stream is None:
            if self._capture_stream is None:
                self._capture_stream = self.Stream()
            stream = self._capture_stream
        self.synchronize()
        self.empty_cache()
        leave = self._enter(stream)
        pool = self.graph_pool_handle() if pool is None else pool
        self._begin(graph, pool, stream)
        try:
            yield
        finally:  # a capture that ends badly leaves the current stream as it is
            self._end(graph, pool, stream)
            leave()

    def graph_pool_handle(self) -> tuple[int, int]:
        self._handles += 1
        return 0, self._handles

    def is_current_stream_capturing(self) -> bool:
        return self.current_stream().capture is not None

    def synchronize(self, device: int | None = None) -> None:
        self.synchronizations += 1
        self._look("synchronize")
        device = self.current_device() if device is None else device
        for stream in self.streams:
            if stream.device_index == device:
                see(self.host, stream.clock)

    def empty_cache(self) -> None:
        for device, recording in enumerate(self._recording):
            if not recording:
                self._sweep(device)

    def memory_snapshot(self, mempool_id: tuple[int, int]) -> list[dict[str, int]]:
        found = [pools[mempool_id] for pools in self._pools if mempool_id in pools]
        return [{"total_size": segment.size} for pool in found for segment in pool.segments]

    def get_device_properties(self, device: int) -> Any:
        return SimpleNamespace(total_memory=self._memory)

    # Inside.

    def _stream(self, device: int) -> Stream:
        stream = Stream(self, device, self._streams)
        self._streams += 1
        self.streams = [*getattr(self, "streams", []), stream]
        return stream

    def _current(self) -> dict[int, Stream]:
        return self._local.__dict__.setdefault("streams", {})

    def _enter(self, stream: Stream) -> Callable[[], None]:
        device, streams = self.current_device(), dict(self._current())
        self._local.device = stream.device_index
        self._current()[stream.device_index] = stream

        def leave() -> None:
            self._local.device, self._local.streams = device, streams

        return leave

    def _begin(self, graph: CUDAGraph, pool: tuple[int, int], stream: Stream) -> None:
        with self.lock:
            self._look("begin of a capture")
            device = stream.device_index
            if pool in self._recording[device]:
                raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
            found = self._pools[device].setdefault(pool, Pool(device))
            if found.used and found.users == 0:
                raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
            found.used, found.users = True, found.users + 1
            self._recording[device].add(pool)
            graph.pool, stream.capture = pool, graph
            self.underway.append(graph)

    def _end(self, graph: CUDAGraph, pool: tuple[int, int], stream: Stream) -> None:
        with self.lock, _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            stream.capture = None
            self.underway.remove(graph)
            for tensor, before in reversed(graph.restore):
                _copy(tensor, before)
            for segment in self._pools[stream.device_index][pool].segments:
                segment.bytes.fill(0xFF)
            if graph.invalid:
                raise RuntimeError(f"CUDA error: capture invalidated: {graph.invalid}")
            device = stream.device_index
            self._recording[device].discard(pool)
            graph.stream = stream
            self.captures += 1
            weakref.finalize(graph, self._release, device, pool)

    def _end_allocate(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self._recording[device]:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self._recording[device].discard(pool)

    def _release(self, device: int, pool: tuple[int, int]) -> None:
        self._pools[device][pool].users -= 1

    def _sweep(self, device: int) -> None:
        """Give back what pools without a graph no longer hold."""
        for pool in self._pools[device].values():
            pool.sweep()
            if pool.used and pool.users == 0 and not pool.blocks:
                pool.segments = []

    def _look(self, what: str) -> None:
        """What may not happen while anything is captured."""
        if self.underway:
            for graph in self.underway:
                graph.invalid = graph.invalid or what
            raise RuntimeError(f"CUDA error: {what}: operation not permitted when stream is capturing")

    def _place(self, tensor: Tensor) -> Place | None:
        found = self._memory_of(tensor)
        return None if found is None else found[0]

    def _memory_of(self, tensor: Tensor) -> tuple[Place, int, int] | None:
        """Where it lies: begin and end in bytes; None for memory that no device has used yet."""
        storage = tensor.untyped_storage()
        key, begin = storage._cdata, tensor.storage_offset() * tensor.element_size()
        end = begin + _span(tensor.shape, tensor.stride()) * tensor.element_size()
        for pools in self._pools:
            for pool in pools.values():
                if key in pool.blocks and not pool.blocks[key].ref.expired():
                    block = pool.blocks[key]
                    return block.segment, block.offset + begin, block.offset + end
        known = self._elsewhere.get(key)
        if known is None or known[0].expired():
            return None
        return known[1], begin, end

    def _adopt(self, tensor: Tensor, device: int) -> None:
        storage = tensor.untyped_storage()
        self._elsewhere[storage._cdata] = StorageWeakRef(storage), Place(device)

    def _placed(self, tensor: Tensor, stream: Stream, fill: bool) -> Tensor:
        """A tensor of the same shape and strides in memory of the stream's pool."""
        size = _span(tensor.shape, tensor.stride()) * tensor.element_size()
        if size == 0:
            self._adopt(tensor, stream.device_index)
            return tensor
        key = (0, 0) if stream.capture is None else stream.capture.pool
        pool, real = self._pools[stream.device_index][key], not tensor.is_meta
        block = pool.allocate(size, stream, real)
        placed = tensor
        if real:
            begin = block.offset
            memory = torch.from_numpy(block.segment.bytes[begin : begin + size]).untyped_storage()
            placed = torch.empty(0, dtype=tensor.dtype).set_(memory, 0, tensor.shape, tensor.stride())
            if fill:
                _copy(placed, tensor)
        storage = placed.untyped_storage()
        block.ref = StorageWeakRef(storage)
        pool.blocks[storage._cdata] = block
        return placed

    def _alias(self, tensor: Tensor) -> Tensor:
        """The same addresses, without keeping them from being used again."""
        found = self._memory_of(tensor)
        memory, offset = tensor.untyped_storage(), tensor.storage_offset()
        if found is not None and isinstance(found[0], Segment) and not tensor.is_meta:
            memory, offset = found[0].base, found[1] // tensor.element_size()
        if tensor.is_meta:  # which has no memory to name, and would be kept
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        with torch.inference_mode(False), torch.no_grad():
            return torch.empty(0, dtype=tensor.dtype).set_(memory, offset, tensor.shape, tensor.stride())

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A kernel."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = [place for tensor in tensors if (place := self._place(tensor)) is not None]
        devices = {place.device for place in places}
        if len(devices) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, found {sorted(devices)}")
        if tensors and not devices:
            return func(*args, **kwargs)  # on the host
        device = devices.pop() if devices else self.current_device()
        for tensor in tensors:
            if self._place(tensor) is None:
                self._adopt(tensor, device)
        stream = self.current_stream(device)
        see(stream.clock, self.host)
        name = func.overloadpacket.__name__
        if name in _LOOKS:
            if stream.capture is not None:
                self._look(f"{func}")
            see(self.host, stream.clock)
        written = _written(func, args, kwargs)
        graph = stream.capture
        if graph is not None:
            self._before(graph, tensors, written)
        shared = {tensor.untyped_storage()._cdata for tensor in tensors}
        new: dict[int, Tensor] = {}
        results = func(*args, **kwargs)
        leaves, empty = tree_leaves(results), "empty" in name  # which is no kernel
        for number, result in enumerate(leaves):
            if isinstance(result, Tensor) and result.untyped_storage()._cdata not in shared:
                if empty:
                    result.zero_()  # an index to be, perhaps
                new[number] = leaves[number] = self._placed(result, stream, fill=True)
        if written or (new and not empty):
            touched = [(self._memory_of(t), id(t) in written) for t in tensors if t.numel() > 0]
            touched += [(self._memory_of(placed), True) for placed in new.values() if placed.numel() > 0]
            if graph is None:
                _touch(stream, touched)
            else:
                graph.calls.append(self._call(func, args, kwargs, tensors, new, touched))
        return tree_unflatten(leaves, tree_structure(results))

    def _before(self, graph: CUDAGraph, tensors: list[Tensor], written: set[int]) -> None:
        """Keep what a call that is only to be recorded writes to."""
        if self.fails is not None:
            graph.invalid = self.fails
            raise RuntimeError(f"CUDA error: {self.fails}")
        own = self._pools[self._place(tensors[0]).device][graph.pool].segments if tensors else []
        for tensor in tensors:
            if id(tensor) in written and self._place(tensor) not in own:
                alias = self._alias(tensor)
                graph.restore.append((alias, alias.clone()))

    def _call(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        tensors: list[Tensor],
        new: dict[int, Tensor],
        touched: Touched,
    ) -> Callable[[Stream], None]:
        """The same call on the same addresses."""
        known = {id(tensor): self._alias(tensor) for tensor in tensors}
        outs = {number: self._alias(placed) for number, placed in new.items() if placed.numel() > 0}
        args, kwargs = tree_map_only(Tensor, lambda tensor: known[id(tensor)], (args, kwargs))

        def call(stream: Stream) -> None:
            see(stream.clock, self.host)
            _touch(stream, touched)
            found = tree_leaves(func(*args, **kwargs))
            for number, out in outs.items():
                _copy(out, found[number])

        return call


def _touch(stream: Stream, touched: Touched) -> None:
    stream.clock[stream] += 1
    for memory, writes in touched:
        if memory is not None:
            memory[0].touch(*memory[1:], stream, writes)


class _Guard:
    """`torch.cuda.device_of`: the device of a tensor, -1 where it is on none."""

    def __init__(self, fake: FakeCuda, index: int) -> None:
        self.idx, self._fake = index, fake

    def __enter__(self) -> None:
        self._device = self._fake.device(self.idx if self.idx >= 0 else self._fake.current_device())
        self._device.__enter__()

    def __exit__(self, *error: object) -> None:
        self._device.__exit__(None, None, None)


class _Kernels(TorchDispatchMode):
    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self._fake.lock:
            return self._fake._run(func, args, kwargs or {})


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> set[int]:
    """Of the tensors that a call writes to, the ids."""
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tree_leaves(args[number] if number < len(args) else kwargs.get(argument.name))
    return {id(leaf) for leaf in found if isinstance(leaf, Tensor)}


def _span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last."""
    if 0 in shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


def _copy(to: Tensor, source: Tensor) -> None:
    """Also where elements share memory."""
    size = _span(source.shape, source.stride())
    to.as_strided((size,), (1,)).copy_(source.as_strided((size,), (1,)))
