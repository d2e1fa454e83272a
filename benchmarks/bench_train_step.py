"""A step of the transformer's phase: ours, and the same by the definitions in eager PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks._harness import Benchmark, Call, Case, Inputs, Provider
from benchmarks.shapes import MODELS
from hitsr_fast._version import __version__
from hitsr_fast.dispatch import use_backend
from hitsr_fast.losses.preference import preference_loss
from hitsr_fast.models import HitConfig, HitVar
from hitsr_fast.models.hit_var.config import PRESETS
from hitsr_fast.ops import preference_cross_entropy
from hitsr_fast.train.config import DataConfig, NextScaleConfig, OptimConfig, Phase, PrecisionConfig
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.optim import make_optimizers
from hitsr_fast.train.parallel import Parallel
from hitsr_fast.train.task import Batch
from hitsr_fast.train.tasks import TASKS

_RATE = 1e-7  # so that the loss of a later call is that of the first
_CLOSE = 2e-4  # of the loss: teacher inputs and sums differ by roundings


@dataclass(frozen=True)
class TrainStepCase(Case):
    """Forward and backward pass and the optimiser, in float32, with the preference term.

    Attributes:
        preset: of the model, with random weights.
        part: "step": all of it, from HR crops: degradation, latents, tokens, transformer; "transformer": from
            features, teacher inputs and tokens.
        B: images.
        depth: blocks; 0 is the preset's.
    """

    preset: str
    part: Literal["step", "transformer"]
    B: int
    depth: int = 0

    @property
    def config(self) -> HitConfig:
        """That of the model."""
        config = PRESETS[self.preset]
        body = replace(config.transformer, depth=self.depth or config.transformer.depth)
        return replace(config, transformer=body)

    @property
    def items(self) -> int:
        return self.B

    @property
    def flops(self) -> int:
        """Blocks and classifier, thrice; encoder, tokens and embeddings left out."""
        shape, depth = MODELS[self.preset], self.config.transformer.depth
        total = 2 * shape.width * shape.K * sum(shape.lengths)
        for step in range(len(shape.lengths)):
            start, length = shape.step(step)
            total += depth * (24 * shape.width**2 * length + 4 * shape.width * length * (start + length))
        return 3 * self.B * total

    def inputs(self, device: torch.device) -> Inputs:
        generator, config = torch.Generator().manual_seed(0), self.config.tokenizer
        if self.part == "step":
            side = config.image_size
            made: tuple[Tensor, ...] = (
                torch.randint(256, (self.B, 3, side, side), generator=generator, dtype=torch.uint8),
            )
        else:
            size, tokens = config.latent_size, config.pyramid.num_tokens
            made = (
                torch.randn(self.B, config.code_dim, size, size, generator=generator),
                torch.randn(self.B, tokens - config.pyramid.lengths[0], config.code_dim, generator=generator),
                *torch.randint(config.codebook_size, (2, self.B, tokens), generator=generator),
            )
        return tuple(tensor.to(device) for tensor in made)

    def expected(self, *inputs: Tensor) -> Any:
        with use_backend("reference"):
            return _Step(self, inputs, fused=False)()

    def wrong_rows(self, result: Any, expected: Any) -> int:
        """1 where the loss is another."""
        return int(not torch.allclose(result, expected, rtol=_CLOSE, atol=0.0))


@functools.lru_cache(maxsize=1)
def _model(case: TrainStepCase, device: torch.device) -> HitVar:
    torch.manual_seed(0)
    return HitVar(case.config).to(device)


class _Step:
    """The call of a provider, whose weights are its own."""

    def __init__(self, case: TrainStepCase, inputs: Inputs, *, fused: bool) -> None:
        device = inputs[0].device
        model = HitVar(case.config).to(device)
        model.load_state_dict(_model(case, device).state_dict())
        phase = Phase(
            name="next_scale",
            task=NextScaleConfig(preference=1.0, class_dropout=0.1),
            batch=case.B,
            optim=OptimConfig(lr=_RATE, ema=0.0),
            precision=PrecisionConfig(dtype="float32"),
        )
        task = TASKS["next_scale"](model, phase, DataConfig(), device)
        task.train()
        if fused:
            self.optimizers: list[Any] = list(make_optimizers(task, phase, Parallel(device)))
        else:
            self.optimizers = [torch.optim.AdamW(task.parameters(), lr=_RATE, betas=(0.9, 0.95))]
        self.loss: Callable[[], Tensor]
        if case.part == "step":
            index = torch.arange(case.B)
            self.loss = lambda: task(Batch(inputs[0], index), Draw(0, phase.name, index, device)).total
        else:
            self.loss = lambda: _transformer_loss(model, *inputs)

    def __call__(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()


def _transformer_loss(model: HitVar, features: Tensor, teacher: Tensor, *tokens: Tensor) -> Tensor:
    transformer = model.transformer
    class_id = torch.zeros(len(features), dtype=torch.int64, device=features.device)
    hidden = transformer.hidden(features, class_id, teacher)
    head, (labels, rejected) = transformer.head, (one.flatten() for one in tokens)
    rows, gaps = preference_cross_entropy(hidden.flatten(0, 1), head.weight, head.bias, labels, rejected)
    return rows.mean() + preference_loss(gaps.view(len(features), -1), beta=1.0, reduction="mean").mean()


def _plain(case: TrainStepCase, inputs: Inputs) -> Call:
    step = _Step(case, inputs, fused=False)

    def call() -> Tensor:
        with use_backend("reference"):
            return step()

    return call


BENCHMARK = Benchmark(
    op="train_step",
    providers=(
        Provider("reference", _plain, version=lambda: __version__),
        Provider("ours", lambda c, i: _Step(c, i, fused=True), version=lambda: __version__, ours=True),
    ),
    cases=(
        TrainStepCase("hit-tiny", "transformer", 8),
        TrainStepCase("hit-tiny", "step", 8),
        TrainStepCase("hit-d16", "transformer", 1, depth=4),
    ),
    quick=(
        TrainStepCase("hit-tiny", "transformer", 1, depth=1),
        TrainStepCase("hit-tiny", "step", 1, depth=1),
    ),
    repeats=5,
)
