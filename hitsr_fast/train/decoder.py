"""Stage 3: the decoders learn to decode what the transformer really predicts.

HiTokSR (arXiv 2606.01157) ends with this stage: the decoder is tuned on sampled tokens, everything else
frozen. It is not part of HIT-VAR; `steps=0` leaves it out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.imaging.colour import wavelet_colour_fix
from hitsr_fast.losses.reconstruction import ReconstructionLoss
from hitsr_fast.models import HitSampler, HitTokenizer, HitVar
from hitsr_fast.train.autoencoder import PyramidScore
from hitsr_fast.train.batches import PairBatches
from hitsr_fast.train.config import DecoderTrainConfig


class DecoderStage:
    """Trains the decoders only; bf16 autocast."""

    name = "decoder"

    def __init__(
        self, model: HitVar, batches: PairBatches, held_out: PairBatches, config: DecoderTrainConfig
    ) -> None:
        self.model: nn.Module = model.tokenizer
        self.whole = model
        self.batches = batches
        self.held_out = held_out
        self.config = config
        self.sampler = HitSampler(model, dtype=torch.bfloat16)  # of the transformer, which does not change
        self.distance = ReconstructionLoss(config.loss).to(batches.device)
        model.requires_grad_(False)
        model.transformer.eval()
        model.tokenizer.decoders.requires_grad_(True)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        config = self.config
        return [torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.95))]

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        config, tokenizer = self.config, self.whole.tokenizer
        images, lr, class_id = self.batches.pairs(step, config.batch)
        generator = torch.Generator().manual_seed(step)
        levels = [level.contiguous(memory_format=torch.channels_last) for level in tokenizer.pyramid(images)]
        sampled = round(config.sampled * config.batch)
        sampled_latents: list[Tensor] = []
        own_latents: list[Tensor] = []
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
            if sampled > 0:
                features = self.whole.lr_features(lr[:sampled])
                draws = torch.Generator(features.device).manual_seed(step)
                _, sampled_latents = self.sampler.sample(
                    features, class_id[:sampled], top_k=config.top_k, generator=draws
                )
            if sampled < config.batch:
                own = [tokenizer.encode(level[sampled:]) for level in levels]
                own_latents = tokenizer.quantize.tokenize(own).reconstructions
        total = images.new_zeros(())
        metrics: dict[str, float] = {}
        for target, image in enumerate(levels):
            outputs: list[Tensor] = []
            with torch.autocast(images.device.type, torch.bfloat16):
                if sampled_latents:
                    outputs.append(self.whole.decode(sampled_latents, target, lr[:sampled]).float())
                if own_latents:  # without the LR image, so that the tokenizer stays one by itself
                    outputs.append(tokenizer.decode(own_latents[target], target).float())
            output = self._partly_fixed(torch.cat(outputs), lr, target, generator)
            with torch.autocast(images.device.type, torch.bfloat16):
                loss = self.distance(output, image, generator)
            total = total + loss / len(levels)
            metrics[f"image_{image.shape[-1]}"] = loss.item()
        return total, metrics

    def _partly_fixed(self, output: Tensor, lr: Tensor, target: int, generator: torch.Generator) -> Tensor:
        """The output, for a share of the samples after the colour fix that inference applies."""
        source = F.interpolate(lr, size=output.shape[-2:], mode="bicubic", align_corners=False)
        fixed = wavelet_colour_fix(output, source, self.whole.config.colour_fix_levels[target])
        chosen = torch.rand(len(output), 1, 1, 1, generator=generator) < self.config.colour_fixed
        return torch.where(chosen.to(output.device), fixed, output)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, HitTokenizer)
        score = PyramidScore(model)
        for i in range(2):
            images, lr, class_id = self.held_out.pairs(i, 16)
            with torch.autocast(images.device.type, torch.bfloat16):
                _, latents = self.sampler.sample(self.whole.lr_features(lr), class_id)
            score.add(latents, images, [self.whole.lr_image(lr, target) for target in range(len(latents))])
        return score.means()
