"""Stage 0: the autoencoder without quantization, which the codebook is then fitted to.

A tokenizer trained quantized from scratch on little data collapses to a few codes. Where one starts from
VAR's or Switti's released tokenizer, this stage is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hitsr_fast.losses.reconstruction import ReconstructionLoss
from hitsr_fast.metrics import psnr_y
from hitsr_fast.metrics.lpips import lpips
from hitsr_fast.metrics.lpips_weights import weights_path
from hitsr_fast.models import HitTokenizer
from hitsr_fast.train.batches import PairBatches
from hitsr_fast.train.config import AutoencoderConfig
from hitsr_fast.train.stage import Stage


class AutoencoderStage(Stage[HitTokenizer]):
    """Trains the encoder and the first decoder on all target sizes at once."""

    name = "autoencoder"
    config: AutoencoderConfig

    def __init__(
        self, model: HitTokenizer, batches: PairBatches, held_out: PairBatches, config: AutoencoderConfig
    ) -> None:
        super().__init__(model, batches, held_out, config)
        self.distance = ReconstructionLoss(config.loss).to(self.device)
        model.quantize.requires_grad_(False)
        model.decoders[1:].requires_grad_(False)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        config = self.config
        hr, upsampled, _ = self.batches(step, config.batch)
        replaced = int(config.lr_share * config.batch)
        images = torch.cat([upsampled[:replaced], hr[replaced:]])
        generator = torch.Generator().manual_seed(step)
        total = images.new_zeros(())
        metrics: dict[str, float] = {}
        levels = self.model.pyramid(images)
        for image in levels:
            image = image.contiguous(memory_format=torch.channels_last)
            with self.autocast():
                latent = self.model.encode(image)
                level = torch.rand(len(image), 1, 1, 1, generator=generator) * config.latent_noise
                noise = (torch.randn(latent.shape, generator=generator) * level).to(latent.device)
                output = self.model.decode(latent + noise * latent.detach().float().std(), 0)
                loss = self.distance(output, image, generator)
            total = total + loss / len(levels)
            metrics[f"loss_{image.shape[-1]}"] = loss.item()
        return total, metrics

    def evaluate(self, model: HitTokenizer) -> dict[str, float]:
        score = ImageScore()
        for image in evaluation_images(self.held_out):
            with self.autocast():
                output = model.decode(model.encode(image), 0)
            score.add(output, image)
        return score.means()


class ImageScore:
    """Running means of PSNR-Y, and of LPIPS-alex where its weights are there, on images in [-1, 1]."""

    def __init__(self) -> None:
        self.psnr, self.lpips, self.count = 0.0, 0.0, 0
        self.has_lpips = weights_path().is_file()

    def add(self, output: Tensor, target: Tensor) -> None:
        output = output.float().clamp(-1, 1)
        self.psnr += psnr_y((output + 1) / 2, (target + 1) / 2).sum().item()
        if self.has_lpips:
            self.lpips += lpips(output, target).sum().item()
        self.count += len(target)

    def means(self, prefix: str = "held_out") -> dict[str, float]:
        means = {f"{prefix}_psnr_y": self.psnr / self.count}
        if self.has_lpips:
            means[f"{prefix}_lpips_alex"] = self.lpips / self.count
        return means


class PyramidScore:
    """`ImageScore` of what a tokenizer decodes at each target."""

    def __init__(self, model: HitTokenizer) -> None:
        self.model = model
        self.scores = [ImageScore() for _ in model.config.targets]

    def add(self, outputs: Sequence[Tensor], images: Tensor) -> None:
        """Compare the output `(B, 3, side, side)` of each target with `images` at that size."""
        for score, output, level in zip(self.scores, outputs, self.model.pyramid(images), strict=True):
            score.add(output, level)

    def means(self) -> dict[str, float]:
        config = self.model.config
        return {
            key: value
            for score, size in zip(self.scores, config.target_sizes, strict=True)
            for key, value in score.means(f"held_out_{size * config.stride}").items()
        }


def evaluation_images(held_out: PairBatches, *, batches: int = 2, size: int = 16) -> Iterator[Tensor]:
    """The fixed held-out crops on which the tokenizer stages report."""
    for i in range(batches):
        yield held_out.hr(i, size)
