"""Memory and streams of the stand-in for `torch.cuda`: what is allocated where, and who touched it when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from tests.ops.fake_cuda import CUDAGraph, FakeCuda

MIB = 2**20


class RaceError(AssertionError):
    """Two streams touch the same memory in no order."""


class Stream:
    """Kernels in order; `clock` is what it has seen of all streams."""

    def __init__(self, fake: FakeCuda, device: int, number: int) -> None:
        self._fake, self.device_index, self.cuda_stream = fake, device, number
        self.clock: dict[Stream, int] = {self: 0}
        self.capture: CUDAGraph | None = None

    def wait_event(self, event: Event) -> None:
        see(self.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        see(self.clock, other.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        see(self._fake.host, self.clock)


def see(clock: dict[Stream, int], other: dict[Stream, int]) -> None:
    """What `other` has seen, `clock` has seen from now on."""
    for stream, tick in other.items():
        clock[stream] = max(tick, clock.get(stream, 0))


class Event:
    """A place in a stream."""

    def __init__(self) -> None:
        self.clock: dict[Stream, int] = {}

    def record(self, stream: Stream) -> None:
        self.clock = dict(stream.clock)


class Place:
    """Memory with a device, and who touched it: segments of pools, and tensors from elsewhere."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.touched: dict[Stream, dict[tuple[int, int, bool], int]] = {}

    def touch(self, begin: int, end: int, stream: Stream, writes: bool) -> None:
        for other, touches in self.touched.items():
            if other is stream:
                continue
            seen = stream.clock.get(other, 0)
            for (first, last, wrote), tick in touches.items():
                if tick > seen and first < end and begin < last and (writes or wrote):
                    does, did = "writes" if writes else "reads", "wrote" if wrote else "read"
                    raise RaceError(
                        f"stream {stream.cuda_stream} {does} what stream {other.cuda_stream} {did}, unordered"
                    )
        self.touched.setdefault(stream, {})[begin, end, writes] = stream.clock[stream]


class Segment(Place):
    """What a pool has asked the driver for; `base` has its bytes, unless only sizes count."""

    def __init__(self, device: int, stream: Stream, size: int, small: bool, real: bool) -> None:
        super().__init__(device)
        self.kind, self.size, self.free = (stream, small, real), size, [(0, size)]
        self.bytes = np.full(size if real else 0, 0xFF, dtype=np.uint8)  # NaN, or -1
        self.base = torch.from_numpy(self.bytes).untyped_storage()

    def give_back(self, offset: int, size: int) -> None:
        begin, end = offset, offset + size
        rest = []
        for other, length in self.free:
            if other + length == begin:
                begin = other
            elif other == end:
                end = other + length
            else:
                rest.append((other, length))
        self.free = sorted([*rest, (begin, end - begin)])


class Block:
    """Memory of one tensor."""

    def __init__(self, segment: Segment, offset: int, size: int) -> None:
        self.segment, self.offset, self.size = segment, offset, size
        self.ref: StorageWeakRef


class Pool:
    """Segments, and the blocks that tensors hold of them."""

    def __init__(self, device: int) -> None:
        self.device, self.users, self.used = device, 0, False
        self.segments: list[Segment] = []
        self.blocks: dict[int, Block] = {}

    def sweep(self) -> None:
        for key, block in list(self.blocks.items()):
            if block.ref.expired():
                del self.blocks[key]
                block.segment.give_back(block.offset, block.size)

    def allocate(self, size: int, stream: Stream, real: bool) -> Block:
        """Rounded, out of the tightest gap or a new segment, with the caching allocator's numbers."""
        self.sweep()
        size = -(-size // 512) * 512
        small = size <= MIB
        gaps = [
            (length, number, offset)
            for number, segment in enumerate(self.segments)
            if segment.kind == (stream, small, real)
            for offset, length in segment.free
            if length >= size
        ]
        if not gaps:
            asked = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            self.segments.append(Segment(self.device, stream, asked, small, real))
            gaps = [(asked, len(self.segments) - 1, 0)]
        length, number, offset = min(gaps)
        segment = self.segments[number]
        if length - size < (512 if small else MIB + 1):
            size = length
        segment.free.remove((offset, length))
        if size < length:
            segment.free.append((offset + size, length - size))
        return Block(segment, offset, size)

    def reserved(self) -> int:
        return sum(segment.size for segment in self.segments)
