"""The decoders learn to decode what the transformer really predicts.

HiTokSR (arXiv 2606.01157) ends with this phase: the decoder is tuned on sampled tokens, everything else
frozen. It is not part of HIT-VAR.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.imaging.colour import wavelet_colour_fix
from hitsr_fast.losses.reconstruction import ReconstructionLoss, over_targets, take_rows
from hitsr_fast.models import HitVar
from hitsr_fast.models.hit_var.sampler import HitSampler
from hitsr_fast.nn.sampling import SamplingOptions
from hitsr_fast.train.config import DataConfig, DecodeConfig, Phase
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.task import Batch, Losses
from hitsr_fast.train.tasks.base import HitTask
from hitsr_fast.train.tasks.scores import PyramidScore

_ALL = 2**63  # seeds are below it


class Decode(HitTask):
    """Trains the decoders only."""

    parts: ClassVar[Mapping[str, str]] = {"decoders": "decoders"}

    def __init__(
        self, model: HitVar, phase: Phase, data: DataConfig, device: torch.device | str = "cpu"
    ) -> None:
        assert isinstance(phase.task, DecodeConfig)
        super().__init__(model, phase, data, device, distance=ReconstructionLoss(phase.task.loss))
        self.config = phase.task
        self.decoders = self.model.tokenizer.decoders.requires_grad_(True)
        if self.config.sampled == 0:
            self.without_lr(self.decoders)
        self._sampler: HitSampler | None = None

    @property
    def sampler(self) -> HitSampler:
        """Of the transformer, which does not change."""
        if self._sampler is None:
            self._sampler = HitSampler(self.model, dtype=self.dtype, cuda_graphs=False)
        return self._sampler

    def forward(self, batch: Batch, draw: Draw) -> Losses:
        """Mean over the targets of the image loss, of sampled tokens and, for a share, of the images' own."""
        config, tokenizer = self.config, self.model.tokenizer
        images, lr, class_id = self.pairs(batch, draw)
        levels = self.levels(images)
        seeds = draw.seeds("sampled")
        sampled = [row for row, seed in enumerate(seeds) if seed < config.sampled * _ALL]
        own = [row for row, seed in enumerate(seeds) if seed >= config.sampled * _ALL]
        sampled_latents: list[Tensor] = []
        own_latents: list[Tensor] = []
        if sampled:
            seen_lr = take_rows(lr, sampled)
            sampled_latents = self._sampled(seen_lr, take_rows(class_id, sampled), draw[sampled])
        if own:
            with torch.no_grad():
                latents = self.latents([take_rows(level, own) for level in levels])
                own_latents = tokenizer.quantize.tokenize(latents).reconstructions
        losses, means = [], {}
        for target, image in enumerate(levels):
            outputs: list[Tensor] = []
            with self.autocast():
                if sampled:
                    outputs.append(self.model.decode(sampled_latents, target, seen_lr).float())
                if own:  # without the LR image, so that the tokenizer stays one by itself
                    outputs.append(tokenizer.decode(own_latents[target], target).float())
            places = {row: place for place, row in enumerate([*sampled, *own])}
            ordered = take_rows(torch.cat(outputs), [places[row] for row in range(len(seeds))])
            output = self._partly_fixed(ordered, lr, target, draw)
            with self.autocast():
                loss = self.frozen.distance(output, image, draw)
            losses.append(loss)
            means[f"image_{image.shape[-1]}"] = loss.detach().mean()
        total = over_targets(losses, config.loss).mean()
        if not sampled:  # other processes wait for a gradient of what acts on the LR image
            unused = [p for p in self.lr_parameters(self.decoders) if p.requires_grad]
            total = total + 0.0 * sum(p.sum() for p in unused)
        return Losses(total, means, {})

    @torch.no_grad()
    def _sampled(self, lr: Tensor, class_id: Tensor, draw: Draw) -> list[Tensor]:
        """The latent of each target that the transformer predicts."""
        with self.autocast():
            features = self.model.lr_features(lr)
        top_k = self.config.top_k
        if top_k == 1:
            return self.sampler.sample(features, class_id)[1]
        # Each by itself: what one draws depends on its place in a batch.
        every = [
            self.sampler.sample(
                features[row : row + 1], class_id[row : row + 1], SamplingOptions(top_k=top_k, seed=seed)
            )[1]
            for row, seed in enumerate(draw.seeds("tokens"))
        ]
        return [torch.cat(latents) for latents in zip(*every, strict=True)]

    def _partly_fixed(self, output: Tensor, lr: Tensor, target: int, draw: Draw) -> Tensor:
        """The output, for a share of the samples after the colour fix that inference applies."""
        source = F.interpolate(lr, size=output.shape[-2:], mode="bicubic", align_corners=False)
        fixed = wavelet_colour_fix(output, source, self.model.config.colour_fix_levels[target])
        chosen = draw.uniform(f"colour_fixed/{target}", 1, 1, 1) < self.config.colour_fixed
        return torch.where(chosen, fixed, output)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], draws: Iterable[Draw]) -> dict[str, float]:
        """PSNR-Y and LPIPS of what greedy codes decode to, before any colour fix."""
        score = PyramidScore(self.sides)
        for batch, draw in zip(batches, draws, strict=False):
            images, lr, class_id = self.pairs(batch, draw)
            score.add(self.decoded_samples(self.sampler, lr, class_id), self.levels(images))
        return score.means()

    @torch.no_grad()
    def pictures(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """What the model predicts, greedily."""
        images, lr, class_id = self.pairs(batch, draw)
        return self.grid(images, lr, self.decoded_samples(self.sampler, lr, class_id))

    def artifact(self) -> dict[str, Tensor]:
        """The decoders."""
        return self.state_of("tokenizer.decoders.")
