"""Processes that train together: what each has of the model, and what they tell each other."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hitsr_fast import env
from hitsr_fast.pipeline import pick_device
from hitsr_fast.train.config import Phase
from hitsr_fast.train.task import Task

# The former name warns in torch 2.14, the new one is not known to torch 2.10.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor, in the same memory; another tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def like(shard: Tensor, parameter: Tensor) -> Tensor:
    """A shard, in the same memory, as part of a tensor that is sharded as a parameter is."""
    if not isinstance(parameter, DTensor):
        return shard
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        shard, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


class Parallel:
    """The processes of a run, from one of them.

    Nothing here makes the host wait for a device but `agreed` and `barrier`, which wait for the other hosts.

    Attributes:
        rank, world: Number of this process, and of processes.
        device: That this process computes on.
        sharded: Whether the task of now has its trained parameters sharded over the processes.
    """

    def __init__(self, device: torch.device | str, rank: int = 0, world: int = 1) -> None:
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.sharded = False
        self._called: nn.Module | None = None

    @classmethod
    def start(cls, device: torch.device | str = "auto") -> Parallel:
        """Join the processes that `torchrun` started, by gloo on CPUs and NCCL on GPUs; or be alone.

        Raises:
            ValueError: `device` is "cuda" and there is none.
        """
        rank, world, place = env.rank(), env.world(), pick_device(device)
        if place.type == "cuda":
            place = torch.device("cuda", env.local_rank())
            torch.cuda.set_device(place)
        if world > 1 and not dist.is_initialized():
            # The hosts agree by gloo, so that none waits for its GPU.
            dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
        return cls(place, rank, world)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @functools.cached_property
    def mesh(self) -> DeviceMesh:
        """The processes in a row, over which parameters are sharded; the same for every phase."""
        return init_device_mesh(self.device.type, (self.world,))

    # --- the model

    def share(self, task: Task) -> None:
        """Give all processes the first one's parameters and buffers."""
        if self.world == 1:
            return
        with torch.no_grad():
            for tensor in [*task.parameters(), *task.buffers()]:
                received = tensor.detach().contiguous().clone()
                dist.broadcast(received, 0)
                tensor.copy_(received)  # raises the version by which what is packed of it is known to be old

    def prepare(self, task: Task, phase: Phase) -> nn.Module:
        """Spread a task over the processes, as the phase says.

        Blocks (`task.units()`) that are not trained stay whole, as do all parameters without a gradient. With
        "fsdp" trained parameters become contiguous: it takes no others.

        Returns:
            What is called in the task's place.
        """
        config, units = phase.parallel, task.units()
        if config.activation_checkpointing:
            for unit in units:
                # No draw is PyTorch's: there is no state of a generator to keep.
                unit.forward = functools.partial(
                    checkpoint, unit.forward, use_reentrant=False, preserve_rng_state=False
                )
        if config.compile:
            for unit in units or (task,):
                unit.compile()
        self.sharded = config.strategy == "fsdp" and self.world > 1
        self._called = task
        if self.sharded:
            _shard(task, self)
        elif self.world > 1:
            # Without devices, since it would bring the samples' indices to the GPU, too.
            options: dict[str, Any] = {
                _SYNC_BUFFERS: False,
                "init_sync": False,
                "gradient_as_bucket_view": True,
            }
            self._called = DistributedDataParallel(task, **options)
        return self._called

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around both passes of a micro-batch: gradients are exchanged in the last one alone."""
        called = self._called
        if isinstance(called, FSDPModule):
            called.set_requires_gradient_sync(last)
        if isinstance(called, DistributedDataParallel) and not last:
            with called.no_sync():
                yield
        else:
            yield

    @contextmanager
    def whole(self, task: Task) -> Iterator[None]:
        """In this context a process has the whole parameters, and the task's parts can be called alone."""
        root: nn.Module = task
        modules = [module for module in task.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not root, recurse=False)

    @torch.no_grad()
    def release(self, task: Task) -> None:
        """Give the task its whole parameters back, for good; it is not trained any more."""
        for module in task.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    module.register_parameter(name, nn.Parameter(parameter.full_tensor()))
        self.sharded, self._called = False, None

    # --- what they tell each other

    def summed(self, tensor: Tensor) -> Tensor:
        """Sum over the processes; may be the tensor itself, changed."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means over the processes, which all give the same names and shapes; float32."""
        return {name: value / self.world for name, value in self._together(values, torch.float32).items()}

    def total(self, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the processes, which all give the same names and shapes; int64."""
        return self._together(counts, torch.int64)

    def _together(self, values: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        if not values:
            return {}
        flat = self.summed(torch.cat([value.detach().to(dtype).flatten() for value in values.values()]))
        parts = flat.split([value.numel() for value in values.values()])
        return {
            name: part.view(value.shape) for (name, value), part in zip(values.items(), parts, strict=True)
        }

    def agreed(self, *flags: bool) -> list[bool]:
        """Each flag, where any process has it; known to the hosts alone, no device is waited for."""
        if self.world == 1:
            return list(flags)
        word = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(word, dist.ReduceOp.MAX)
        return [bool(flag) for flag in word.tolist()]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.agreed(False)


def _shard(task: Task, parallel: Parallel) -> None:
    for parameter in task.parameters():
        parameter.data = parameter.data.contiguous()
    frozen = {parameter for parameter in task.parameters() if not parameter.requires_grad}
    for unit in task.units():
        if any(parameter.requires_grad for parameter in unit.parameters()):
            fully_shard(unit, mesh=parallel.mesh, reshard_after_forward=True, ignored_params=frozen)
    fully_shard(task, mesh=parallel.mesh, reshard_after_forward=False, ignored_params=frozen)
