"""The autoencoder without quantization, which a codebook is then fitted to.

A tokenizer trained quantized from scratch on little data collapses to a few codes. Where one starts from
VAR's or Switti's released tokenizer, this phase is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hitsr_fast.losses.reconstruction import ReconstructionLoss, over_targets, take_rows
from hitsr_fast.models import HitVar
from hitsr_fast.train.config import AutoencodeConfig, DataConfig, Phase
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.linear_start import start_linear
from hitsr_fast.train.pairs import lr_pairs
from hitsr_fast.train.task import Batch, Losses, images_of
from hitsr_fast.train.tasks.base import HitTask
from hitsr_fast.train.tasks.scores import ImageScore

_LINEAR_START_IMAGES = 256
_ALL = 2**63  # seeds are below it


class Autoencode(HitTask):
    """Encoder and one decoder, on all target sizes at once; the decoder becomes that of every target."""

    parts: ClassVar[Mapping[str, str]] = {
        "encoder": "encoder",
        "quant_conv": "encoder",
        "decoders": "decoders",
    }

    def __init__(
        self, model: HitVar, phase: Phase, data: DataConfig, device: torch.device | str = "cpu"
    ) -> None:
        assert isinstance(phase.task, AutoencodeConfig)
        super().__init__(model, phase, data, device, distance=ReconstructionLoss(phase.task.loss))
        self.config = phase.task
        tokenizer = self.model.tokenizer
        self.encoder, self.quant_conv = tokenizer.encoder, tokenizer.quant_conv
        self.encoder.requires_grad_(True)
        self.quant_conv.requires_grad_(True)
        self.decoders = self.without_lr(tokenizer.decoders[:1])

    def forward(self, batch: Batch, draw: Draw) -> Losses:
        """Mean over the targets of the image loss, of latents with noise on them."""
        config, tokenizer = self.config, self.model.tokenizer
        images = self._partly_low(batch, draw)
        losses, means = [], {}
        for image in self.levels(images):
            side = image.shape[-1]
            with self.autocast():
                latent = tokenizer.encode(image)
                strength = draw.uniform(f"noise_strength/{side}", 1, 1, 1) * config.latent_noise
                noise = draw.normal(f"noise/{side}", *latent.shape[1:]) * strength
                deviation = latent.detach().float().std((1, 2, 3), keepdim=True)
                output = tokenizer.decode(latent + noise * deviation, 0)
                loss = self.frozen.distance(output, image, draw)
            losses.append(loss)
            means[f"image_{side}"] = loss.detach().mean()
        return Losses(over_targets(losses, config.loss).mean(), means, {})

    @torch.no_grad()
    def _partly_low(self, batch: Batch, draw: Draw) -> Tensor:
        """The targets, a share of them replaced by the images' own degraded and up-sampled versions."""
        images = self.images(batch)
        rows = [row for row, s in enumerate(draw.seeds("lr_share")) if s < self.config.lr_share * _ALL]
        if not rows:
            return images
        lr, _ = lr_pairs(take_rows(images_of(batch), rows), draw[rows], self.data)
        low = dict(zip(rows, self.upsampled(lr).unbind(), strict=True))
        return torch.stack([low.get(row, image) for row, image in enumerate(images.unbind())])

    @torch.no_grad()
    def start(self, batches: Iterable[Batch], seed: int = 0) -> dict[str, float]:
        """The linear start, where the tokenizer has the linear skips for it."""
        if not self.model.config.tokenizer.linear_skip:
            return {}
        sides: list[list[Tensor]] = []
        count = 0
        for batch in batches:
            sides.append(self.levels(self.images(batch)))
            count += len(batch.images)
            if count >= _LINEAR_START_IMAGES:
                break
        levels = [torch.cat(level)[:_LINEAR_START_IMAGES] for level in zip(*sides, strict=True)]
        return {"linear_start_variance": start_linear(self.model.tokenizer, levels)}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], draws: Iterable[Draw]) -> dict[str, float]:
        """PSNR-Y and LPIPS of the full images."""
        score = ImageScore()
        for batch in batches:
            images = self.images(batch)
            score.add(self._decoded(self.levels(images)[-1:])[0], images)
        return score.means("held_out")

    @torch.no_grad()
    def pictures(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """The images through the autoencoder, at each target size."""
        images, lr, _ = self.pairs(batch, draw)
        return self.grid(images, lr, self._decoded(self.levels(images)))

    def _decoded(self, levels: Iterable[Tensor]) -> list[Tensor]:
        tokenizer = self.model.tokenizer
        with self.autocast():
            return [tokenizer.decode(tokenizer.encode(level), 0).float() for level in levels]

    def artifact(self) -> dict[str, Tensor]:
        """Encoder and decoders, those of all targets the same; no codebook."""
        prefixes = ("tokenizer.encoder.", "tokenizer.quant_conv.", "tokenizer.decoders.")
        return self.shared_decoder(self.state_of(*prefixes), 0)
