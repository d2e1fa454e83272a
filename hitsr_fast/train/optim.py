"""How weights follow their gradients, each process on its own shards, and without reading a value back.

A step is skipped on the device: every optimiser takes `found_inf`, a float32 scalar that is 1 then and 0
else, and leaves weights and state as they are, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer

from hitsr_fast.train.config import Phase, ScheduleConfig
from hitsr_fast.train.parallel import Parallel, like, local
from hitsr_fast.train.task import Group, Task

_MOMENTUM = 0.95  # of Muon
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315), 5  # coefficients and iterations (Jordan et al., 2024)


def learning_rate(step: int, config: ScheduleConfig) -> float:
    """Learning rate over its peak at a step, counted from 0.

    It rises linearly from `warmup_from` over the first `warmup` of the steps, to reach the peak at the first
    step behind them, and goes to `final_lr`, which it would reach at step number `steps`.

    Example:
        >>> config = ScheduleConfig(steps=4, warmup=0.5, decay="linear", final_lr=0.0)
        >>> [learning_rate(step, config) for step in range(4)]
        [0.0, 0.5, 1.0, 0.5]
    """
    warmup = config.warmup * config.steps
    if step < warmup:
        return config.warmup_from + (1.0 - config.warmup_from) * step / warmup
    along = min((step - warmup) / max(config.steps - warmup, 1e-9), 1.0)
    if config.decay == "constant":
        return 1.0
    if config.decay == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * along))
    elif config.decay == "lin0":
        left = min(1.0, (1.0 - along) / 0.95)
    else:
        left = 1.0 - along
    return config.final_lr + (1.0 - config.final_lr) * left


# --- optimisers


def make_optimizers(task: Task, phase: Phase, parallel: Parallel) -> list[Optimizer]:
    """AdamW, fused, and Muon, each where a group of the task asks for it, with all their state.

    Each param group has `name`, `names` (of the parameters) and `peak` (learning rate) beside the usual.

    Raises:
        ValueError: The groups are not all trained parameters, each once, or Muon gets what is no matrix.
    """
    named = dict(task.named_parameters())
    _check_groups(task.groups(), named)
    made: list[Optimizer] = []
    for kind in ("adamw", "muon"):
        groups = [
            {
                "params": [named[name] if kind == "muon" else local(named[name]) for name in group.names],
                **{"name": group.name, "names": group.names, "peak": group.lr, "lr": group.lr},
                "weight_decay": group.weight_decay,
            }
            for group in task.groups()
            if group.optimizer == kind
        ]
        if groups:
            made.append(Muon(groups) if kind == "muon" else _adamw(groups, phase.optim.betas))
    return made


def _check_groups(groups: list[Group], named: Mapping[str, nn.Parameter]) -> None:
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    given = [name for group in groups for name in group.names]
    faults = {
        "not trained": sorted(set(given) - trained),
        "in no group": sorted(trained - set(given)),
        "in two groups": sorted({name for name in given if given.count(name) > 1}),
        "no matrix, under Muon": [
            n for g in groups if g.optimizer == "muon" for n in g.names if named[n].ndim != 2
        ],
    }
    for fault, names in faults.items():
        if names:
            raise ValueError(
                f"groups: expected each trained parameter in one group, found {fault}: {names[0]}"
            )


def _adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> AdamW:
    optimizer = AdamW(groups, betas=betas, fused=True)
    for parameter in parameters(optimizer):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


class Muon(Optimizer):
    """Momentum whose update of each matrix is made orthogonal (Jordan et al., 2024), with decoupled decay.

    As `torch.optim.Muon`, but that a sharded matrix's update is gathered first, so that what is made
    orthogonal is the whole one, that float32 stays float32 on a CPU, and that a step can be skipped.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        for parameter in parameters(self):
            self.state[parameter] = {
                "momentum_buffer": torch.zeros_like(local(parameter), requires_grad=False)
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, which `found_inf`, an attribute as with PyTorch's fused optimisers, may skip."""
        keep: Tensor = self.found_inf.bool()  # type: ignore[attr-defined]
        for group in self.param_groups:
            for parameter in group["params"]:
                weight, gradient = local(parameter), local(parameter.grad)
                buffer = self.state[parameter]["momentum_buffer"]
                momentum = buffer.lerp(gradient, 1.0 - _MOMENTUM)
                update = _orthogonal_like(gradient.lerp(momentum, _MOMENTUM), parameter)
                rate = group["lr"] * math.sqrt(max(1.0, parameter.shape[0] / parameter.shape[1]))
                moved = (weight * (1.0 - group["lr"] * group["weight_decay"])).sub_(update, alpha=rate)
                weight.copy_(torch.where(keep, weight, moved))
                buffer.copy_(torch.where(keep, buffer, momentum))


def _orthogonal_like(update: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of an update that is made orthogonal as a whole."""
    if not isinstance(parameter, DTensor):
        return orthogonal(update)
    whole = orthogonal(cast(DTensor, like(update, parameter)).full_tensor())
    # Each process has it already: nothing is sent.
    part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return local(part)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the orthogonal factor of `(M, N)`'s polar decomposition, by Newton and Schulz's iteration.

    In bfloat16, but on a CPU, most of which have no fast products of it, in float32.
    """
    (a, b, c), iterations = _NEWTON_SCHULZ
    found = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    tall = matrix.shape[0] > matrix.shape[1]
    if tall:
        found = found.T
    found = found / found.norm().clamp_min(1e-7)
    for _ in range(iterations):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return (found.T if tall else found).to(matrix.dtype)


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """All that an optimiser changes."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def take_gradients(optimizers: list[Optimizer], task: Task) -> None:
    """Hand the gradients of sharded parameters to the local shards that AdamW works on."""
    named = dict(task.named_parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                gradient = named[name].grad
                if gradient is None:
                    raise ValueError(f"groups: expected a gradient of each parameter, found none of {name}")
                if parameter is not named[name]:
                    parameter.grad = local(gradient)


def optimizer_tensors(optimizers: list[Optimizer], task: Task) -> dict[str, Tensor]:
    """Their state by `PARAMETER/KEY`, sharded as the parameters are."""
    named = dict(task.named_parameters())
    found: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for key, value in optimizer.state[parameter].items():
                    found[f"{name}/{key}"] = value if value.dim() == 0 else like(value, named[name])
    return found


@torch.no_grad()
def clip_by_group(
    optimizers: list[Optimizer], clip: float, parallel: Parallel, scale: Tensor | None = None
) -> dict[str, Tensor]:
    """Scale gradients so that those of each group have a norm of at most `clip`.

    Args:
        optimizers: With groups, of which those of one name count as one.
        clip: Largest norm.
        parallel: Over whose processes the gradients may be sharded.
        scale: What they are multiplied by already, which is taken off them.

    Returns:
        Norms before, float32 scalars by the groups' names; not finite where a gradient is not.
    """
    gradients: dict[str, list[Tensor]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            gradients.setdefault(group["name"], []).extend(local(p.grad) for p in group["params"])
    norms = [torch.stack(torch._foreach_norm(own)).norm() for own in gradients.values()]
    together = torch.stack(norms)
    if parallel.sharded:
        together = parallel.summed(together.square()).sqrt()
    if scale is not None:
        together = together / scale
    factors = (clip / (together + 1e-6)).clamp_max(1.0)
    if scale is not None:
        factors = factors / scale
    for own, factor in zip(gradients.values(), factors.unbind(), strict=True):
        torch._foreach_mul_(own, factor)
    return dict(zip(gradients, together.unbind(), strict=True))


# --- averaged weights


class Ema:
    """Exponential moving average of the trained parameters, of each process's shards.

    Its decay rises from 0.1 to `decay`, so that it soon forgets the first weights; with a decay of 0 there is
    none, and the average is the weights themselves.
    """

    def __init__(self, task: Task, decay: float) -> None:
        self._task, self._decay = task, decay
        self._values = (
            {n: local(p).detach().clone() for n, p in task.named_parameters() if p.requires_grad}
            if decay
            else {}
        )

    def _weights(self) -> list[Tensor]:
        named = dict(self._task.named_parameters())
        return [local(named[name]).detach() for name in self._values]

    @torch.no_grad()
    def update(self, step: int, found_inf: Tensor) -> None:
        """Follow the weights after a step, counted from 0, unless that was skipped."""
        if not self._values:
            return
        decay = min(self._decay, (1.0 + step) / (10.0 + step)) if step else 0.0
        averages = list(self._values.values())
        apart = torch._foreach_sub(self._weights(), averages)
        torch._foreach_mul_(apart, (1.0 - found_inf) * (1.0 - decay))
        torch._foreach_add_(averages, apart)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """In this context the task has the averaged weights."""
        kept = [weight.clone() for weight in self._weights()]
        self.take()
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, own in zip(self._weights(), kept, strict=True):
                    weight.copy_(own)

    @torch.no_grad()
    def take(self) -> None:
        """Give the task the averaged weights."""
        for weight, average in zip(self._weights(), self._values.values(), strict=True):
            weight.copy_(average)

    def tensors(self) -> dict[str, Tensor]:
        """By the parameters' names, sharded as they are."""
        named = dict(self._task.named_parameters())
        return {name: like(value, named[name]) for name, value in self._values.items()}
