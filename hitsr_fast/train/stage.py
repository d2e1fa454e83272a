"""What the stages of training have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from hitsr_fast.pipeline import pick_dtype
from hitsr_fast.train.batches import PairBatches
from hitsr_fast.train.config import StageConfig

ModelT = TypeVar("ModelT", bound=nn.Module)


class Stage(ABC, Generic[ModelT]):
    """What a stage of training brings: a model, its optimisers, a loss, an evaluation.

    Args:
        model: What is trained: those of its parameters that require a gradient.
        batches: What it is trained on.
        held_out: What it is evaluated on.
        config: The stage's part of the recipe.
    """

    name: str

    def __init__(
        self, model: ModelT, batches: PairBatches, held_out: PairBatches, config: StageConfig
    ) -> None:
        self.model, self.batches, self.held_out, self.config = model, batches, held_out, config
        self.device = torch.device(batches.device)
        self.dtype = pick_dtype(self.device) if config.dtype == "auto" else getattr(torch, config.dtype)

    def autocast(self) -> torch.autocast:
        """Context in which convolutions and matrices are multiplied in the stage's dtype."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW on all that is trained."""
        return [self.adamw([{"params": [p for p in self.model.parameters() if p.requires_grad]}])]

    def adamw(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW with the recipe's rate and decay, which a group may set for itself."""
        config = self.config
        return torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.95))

    @abstractmethod
    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of a step, a function of its number, and what the log says beside it."""

    @abstractmethod
    def evaluate(self, model: ModelT) -> dict[str, float]:
        """What the log says of `model`, the average of the stage's, on held-out photos."""
