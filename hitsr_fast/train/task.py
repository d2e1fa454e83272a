"""What a phase trains: `Task`, whose forward is the loss, and what goes into it and comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from hitsr_fast.train.draw import Draw


class Batch(NamedTuple):
    """Some samples of a step.

    Args:
        images: HR crops, uint8 `(B, 3, S, S)`.
        index: int64 `(B,)` on the CPU, global sample indices.
    """

    images: Tensor
    index: Tensor  # type: ignore[assignment]  # tuples have a method of that name


class Losses(NamedTuple):
    """What a task's forward gives.

    Args:
        total: Scalar, the mean over the samples of the loss of each; what is differentiated.
        means: Detached float scalars or `(S,)` (a value a scale), means over the samples; averaged over
            micro-batches and processes.
        counts: Detached int64 tensors, which it sums: "codes" `(S, K)`, how often each scale took each code.
    """

    total: Tensor
    means: dict[str, Tensor]
    counts: dict[str, Tensor]


class Group(NamedTuple):
    """Parameters that are clipped together and have an optimiser and rates of their own.

    Args:
        name: As in the log; groups of one name are clipped together.
        names: Of parameters of the task.
        optimizer: Muon takes matrices.
        lr: Peak learning rate.
        weight_decay: Weight decay.
    """

    name: str
    names: list[str]
    optimizer: Literal["adamw", "muon"]
    lr: float
    weight_decay: float


class Task(nn.Module, ABC):
    """A phase's loss, as a module.

    Its registered parameters and buffers are those that a checkpoint keeps; those that require a gradient are
    trained, averaged and, with FSDP2, sharded. What is frozen for the phase (the tokenizer under a
    transformer, the networks of LPIPS) is held in `Frozen`, outside of that.

    `forward` draws from `draw` alone, reads no value back and treats each sample by itself, so that any split
    of a batch into micro-batches and processes gives the same mean.
    """

    @abstractmethod
    def forward(self, batch: Batch, draw: Draw) -> Losses:
        """The loss of some samples, whose images are on the task's device."""

    @abstractmethod
    def groups(self) -> list[Group]:
        """Of all parameters that are trained, each in one group."""

    def units(self) -> Sequence[nn.Module]:
        """Modules that are sharded, checkpointed and compiled one by one: the blocks."""
        return ()

    def start(self, batches: Iterable[Batch], seed: int = 0) -> dict[str, float]:
        """What is done before the first step, on training samples of step 0 on; numbers for the log.

        Runs on the first process, whose parameters and buffers the others then take over.

        Args:
            batches: Those samples.
            seed: Of the run.
        """
        return {}

    def after_step(self, step: int) -> None:
        """What is done after a step of the optimisers, by its number, on every process."""

    @abstractmethod
    def evaluate(self, batches: Iterable[Batch], draws: Iterable[Draw]) -> dict[str, float]:
        """Numbers `held_out_*` on fixed held-out samples, of the weights as they are."""

    def pictures(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Columns of an image grid by name ("LR", "x1", "x2", "x4", "HR"), each `(B, 3, h, w)` in [-1, 1]."""
        return {}

    @abstractmethod
    def artifact(self) -> dict[str, Tensor]:
        """What the phase yields: tensors by their names in the whole model's state dict."""


class Frozen:
    """Holds modules that a task uses and does not train, out of its parameters and buffers."""

    def __init__(self, **modules: nn.Module) -> None:
        self._modules = {name: module.requires_grad_(False).eval() for name, module in modules.items()}

    def __getattr__(self, name: str) -> nn.Module:
        try:
            return self._modules[name]
        except KeyError as error:
            raise AttributeError(name) from error


def images_of(batch: Batch) -> Tensor:
    """HR images of a batch: float32 `(B, 3, S, S)` in [-1, 1]."""
    return batch.images.to(torch.float32).div_(127.5).sub_(1.0)
