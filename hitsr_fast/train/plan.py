"""What a recipe will take, before it runs: memory a process, FLOPs, bytes between processes, predicted time.

Memory and FLOPs are counted, not modelled: each phase's own task goes forward and backward once with tensors
that have shapes and no values. The times are predictions from data sheets and assumed efficiencies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import hitsr_fast.ops
from hitsr_fast.models import HitVar
from hitsr_fast.train.config import AutoencodeConfig, Phase, Recipe
from hitsr_fast.train.data import IndexSampler
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.model import model_config
from hitsr_fast.train.parallel import Parallel
from hitsr_fast.train.task import Batch, Task
from hitsr_fast.train.tasks import TASKS
from hitsr_fast.train.tasks.base import HitTask

T = TypeVar("T", bound=Tensor)
_FLOAT = 4  # bytes of a weight, a gradient and an optimiser's number


class Chip(NamedTuple):
    """Of data sheets: dense bfloat16 FLOP/s, and bytes/s of memory and of one direction to its neighbours."""

    flops: float
    memory: float
    link: float


CHIPS: Mapping[str, Chip] = {
    "A100": Chip(312e12, 2.04e12, 300e9),
    "H100": Chip(989e12, 3.35e12, 450e9),
    "H200": Chip(989e12, 4.8e12, 450e9),
    "L40S": Chip(362e12, 0.864e12, 32e9),
    "RTX 4090": Chip(165e12, 1.01e12, 32e9),
}
# Assumed: what is reached of the peaks. Nothing here was measured.
OF_FLOPS, OF_MEMORY, OF_LINK = 0.35, 0.8, 0.7


@dataclass(frozen=True)
class PhasePlan:
    """One phase on a number of GPUs; bytes are those of one process.

    Attributes:
        name: Of the phase.
        parameters, trained: Of the model, and of those the trained ones.
        micro_batch, accumulation: Samples at once in a process, and how often in a step.
        weights: All parameters and buffers, the frozen networks of the loss too.
        optimizer: State of the optimisers, and the averaged weights.
        gradients: Of the trained parameters.
        activations: What forward and backward pass hold beside all these, at their peak.
        flops: Of a step's products and convolutions, of all processes.
        communication: Sent by a process in a step.
        steps: Of the phase.
    """

    name: str
    parameters: int
    trained: int
    micro_batch: int
    accumulation: int
    weights: float
    optimizer: float
    gradients: float
    activations: float
    flops: float
    communication: float
    steps: int
    gpus: int

    @property
    def memory(self) -> float:
        """Bytes of all together."""
        return self.weights + self.optimizer + self.gradients + self.activations

    def seconds(self, chip: Chip) -> float:
        """Predicted for a step: products, the optimiser's memory and what is sent, one after the other."""
        products = self.flops / self.gpus / (chip.flops * OF_FLOPS)
        update = 3 * (self.optimizer + self.gradients) / (chip.memory * OF_MEMORY)
        return products + update + self.communication / (chip.link * OF_LINK)


def plan(recipe: Recipe, gpus: int) -> list[PhasePlan]:
    """Of each phase that has steps, what it takes on `gpus` processes with a GPU each.

    Where the precision is "auto" it is bfloat16. Degradations, which keep nothing, are left out, and of the
    FLOPs the search for tokens.

    Raises:
        ValueError: `gpus` is below 1, or a batch cannot be shared out among them.
    """
    if gpus < 1:
        raise ValueError(f"gpus: expected at least 1, found {gpus}")
    return [_plan_phase(recipe, phase, gpus) for phase in recipe.phases if phase.schedule.steps]


def step_flops(recipe: Recipe, phase: Phase) -> float:
    """Of a step's products and convolutions, of all processes; what checkpointing makes again is left out."""
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with shapes_only(recipe, phase) as task, counter:
        forward_backward(task, 1, side_of(recipe))
    return float(counter.get_total_flops()) * phase.batch


def _plan_phase(recipe: Recipe, phase: Phase, gpus: int) -> PhasePlan:
    share = IndexSampler(phase.batch, phase.parallel.micro_batch, 0, gpus).micro_batches(0)
    micro_batch = len(share[0])
    with shapes_only(recipe, phase) as task:
        parallel = Parallel("cpu")
        called = parallel.prepare(task, phase)
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter, _Live() as live:
            forward_backward(called, micro_batch, side_of(recipe))
        every = {id(t): t for module in _modules(task) for t in (*module.parameters(), *module.buffers())}
        weights = float(sum(t.numel() * t.element_size() for t in every.values()))
        trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
        numbers = sum(p.numel() for p in trained.values())
        muon = {name for group in task.groups() if group.optimizer == "muon" for name in group.names}
        kept = sum(p.numel() * (1 if name in muon else 2) for name, p in trained.items())
        kept += numbers if phase.optim.ema else 0
        model = task.model if isinstance(task, HitTask) else task
        units = [sum(p.numel() for p in unit.parameters() if p.requires_grad) for unit in task.units()]
        parameters = sum(p.numel() for p in model.parameters())
    gradients = float(numbers * _FLOAT)
    activations, optimizer = live.peak - gradients, float(kept * _FLOAT)
    ring = (gpus - 1) / gpus
    communication: float = 2 * ring * gradients
    if phase.parallel.strategy == "fsdp" and gpus > 1:
        # What is not in a unit stays whole after the forward pass; of the units two are whole at a time.
        whole = (numbers - sum(units) + 2 * max(units, default=0)) * _FLOAT
        communication = ring * gradients * (1 + 2 * len(share))
        weights = weights - gradients + gradients / gpus + whole
        optimizer /= gpus
        if len(share) == 1:  # without synchronization accumulated gradients are whole
            gradients /= gpus
    return PhasePlan(
        name=phase.name,
        parameters=parameters,
        trained=numbers,
        micro_batch=micro_batch,
        accumulation=len(share),
        weights=float(weights),
        optimizer=optimizer,
        gradients=gradients,
        activations=max(activations, 0.0),
        flops=float(counter.get_total_flops()) * len(share) * gpus,
        communication=communication,
        steps=phase.schedule.steps,
        gpus=gpus,
    )


def table(plans: list[PhasePlan]) -> str:
    """The plans as text, predictions marked as such."""
    lines = []
    for one in plans:
        gib = {"weights": one.weights, "optimizer": one.optimizer, "gradients": one.gradients}
        gib |= {"activations": one.activations}
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in gib.items())
        lines += [
            f"{one.name}: {one.steps} steps on {one.gpus} GPUs, "
            f"each {one.accumulation} x {one.micro_batch} samples a step",
            f"  parameters {one.parameters / 1e6:.1f} M, trained {one.trained / 1e6:.1f} M",
            f"  memory a GPU {one.memory / 2**30:.2f} GiB: {parts}",
            f"  a step: {one.flops / 1e12:.2f} TFLOP, {one.communication / 2**20:.0f} MiB sent by a GPU",
        ]
        for name, chip in CHIPS.items():
            seconds = one.seconds(chip)
            hours = seconds * one.steps / 3600
            lines.append(f"  predicted on {name}: {seconds * 1e3:.0f} ms a step, {hours:.2f} h")
    lines.append(
        f"Times are predictions, not measured: data sheets' peaks, of which {OF_FLOPS:.0%} of the FLOPs, "
        f"{OF_MEMORY:.0%} of the memory and {OF_LINK:.0%} of the links are assumed to be reached."
    )
    return "\n".join(lines)


def side_of(recipe: Recipe) -> int:
    """Side of a training crop."""
    return model_config(recipe).tokenizer.image_size


@contextlib.contextmanager
def shapes_only(recipe: Recipe, phase: Phase) -> Iterator[Task]:
    """A phase's task whose tensors have shapes and no values, and a context in which it can be called.

    They say that they are on the CPU; degradations are left out.
    """
    precision = phase.precision
    if precision.dtype == "auto":
        precision = dataclasses.replace(precision, dtype="bfloat16")
    config = phase.task
    if isinstance(config, AutoencodeConfig):
        config = dataclasses.replace(config, lr_share=0.0)
    parallel = dataclasses.replace(phase.parallel, compile=False)
    phase = dataclasses.replace(phase, precision=precision, task=config, parallel=parallel)
    with torch.device("meta"):
        model = HitVar(model_config(recipe))
        task = TASKS[phase.task.kind](model, phase, recipe.data, torch.device("meta"))
    task.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _to_cpu(task)
        task.device = torch.device("cpu")
        task.pairs = functools.partial(_pairs, side_of(recipe) // 4)  # type: ignore[method-assign]
        yield task


def forward_backward(called: nn.Module, samples: int, side: int) -> None:
    """A micro-batch of a task of `shapes_only`, or of what `Parallel.prepare` made of it."""
    images = torch.zeros(samples, 3, side, side, dtype=torch.uint8)
    losses = called(Batch(images, torch.zeros(samples, dtype=torch.int64)), _AnyDraw(samples))
    losses.total.backward()


def _pairs(side: int, batch: Batch, _draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    images = batch.images.float()
    return images, images.new_zeros(len(images), 3, side, side), images.new_zeros(len(images)).long()


class _AnyDraw(Draw):
    """Draws whose values do not matter."""

    def __init__(self, samples: int) -> None:
        self.samples, self.device = samples, torch.device("cpu")

    def __getitem__(self, rows: Any) -> Draw:
        return _AnyDraw(len(np.arange(self.samples)[rows]))

    def _words(self, stream: str, shape: Any) -> Any:
        return np.full((self.samples, *shape), 2**63, np.uint64)


def _modules(task: Task) -> list[nn.Module]:
    """The task, and what it holds outside of its parameters."""
    frozen = vars(task.frozen)["_modules"].values() if isinstance(task, HitTask) else ()
    return [task, *frozen]


def _to_cpu(task: Task) -> None:
    """Replace all parameters and buffers, those that several modules share by one."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, tensor.requires_grad)
            made[id(tensor)] = made[id(new)] = tensor, new
        return made[id(tensor)][1]

    for module in {child: None for root in _modules(task) for child in root.modules()}:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


class _Live(TorchDispatchMode):
    """Bytes of the tensors that operations made in this context and that are still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, out)
        return out

    def _add(self, tensor: T) -> T:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key, size)
        return tensor

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


# --- FLOPs of this package's ops, from the shapes of their arguments


def _attention_flops(products: int, block_lengths: Any, shape: Any) -> int:
    """Of so many products of queries with the keys that they see."""
    B, _, NH, D = shape
    seen = sum(n * end for n, end in zip(block_lengths, accumulate(block_lengths), strict=True))
    flops: int = 2 * products * B * NH * D * seen
    return flops


def _head_flops(products: int, hidden: Any, weight: Any) -> int:
    flops: int = 2 * products * hidden[0] * weight[0] * weight[1]
    return flops


_OPS = torch.ops.hitsr_fast
assert hitsr_fast.ops  # which declares them
_FORMULAS: dict[Any, Any] = {
    _OPS.scale_block_attention: lambda q, k, v, lengths, scale, **_: _attention_flops(2, lengths, q),
    _OPS.scale_block_attention_backward: lambda grad, q, k, v, out, lse, lengths, scale, **_: (
        _attention_flops(5, lengths, q)
    ),
    _OPS.preference_cross_entropy: lambda hidden, weight, *rest, **_: _head_flops(
        3 if rest[-1] else 1, hidden, weight
    ),
    _OPS.preference_cross_entropy_backward: lambda loss, gap, hidden, weight, *_args, **_: _head_flops(
        3, hidden, weight
    ),
}
