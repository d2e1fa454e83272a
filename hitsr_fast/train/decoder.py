"""Stage 3: the decoders learn to decode what the transformer really predicts.

HiTokSR (arXiv 2606.01157) ends with this stage: the decoder is tuned on sampled tokens, everything else
frozen. It is not part of HIT-VAR; `steps=0` leaves it out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.imaging.colour import wavelet_colour_fix
from hitsr_fast.losses.reconstruction import ReconstructionLoss
from hitsr_fast.models import HitSampler, HitTokenizer, HitVar
from hitsr_fast.nn.sampling import SamplingOptions
from hitsr_fast.train.autoencoder import PyramidScore
from hitsr_fast.train.batches import PairBatches
from hitsr_fast.train.config import DecoderTrainConfig
from hitsr_fast.train.stage import Stage


class DecoderStage(Stage[HitTokenizer]):
    """Trains the decoders only."""

    name = "decoder"
    config: DecoderTrainConfig

    def __init__(
        self, model: HitVar, batches: PairBatches, held_out: PairBatches, config: DecoderTrainConfig
    ) -> None:
        super().__init__(model.tokenizer, batches, held_out, config)
        self.whole = model
        self.sampler = HitSampler(model, dtype=self.dtype)  # of the transformer, which does not change
        self.distance = ReconstructionLoss(config.loss).to(self.device)
        model.requires_grad_(False)
        model.transformer.eval()
        model.tokenizer.decoders.requires_grad_(True)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        config, tokenizer = self.config, self.whole.tokenizer
        images, lr, class_id = self.batches.pairs(step, config.batch)
        generator = torch.Generator().manual_seed(step)
        levels = [level.contiguous(memory_format=torch.channels_last) for level in tokenizer.pyramid(images)]
        sampled = round(config.sampled * config.batch)
        sampled_latents: list[Tensor] = []
        own_latents: list[Tensor] = []
        with torch.no_grad(), self.autocast():
            if sampled > 0:
                features = self.whole.lr_features(lr[:sampled])
                draws = torch.Generator(features.device).manual_seed(step)
                _, sampled_latents = self.sampler.sample(
                    features, class_id[:sampled], SamplingOptions(top_k=config.top_k), generator=draws
                )
            if sampled < config.batch:
                own = [tokenizer.encode(level[sampled:]) for level in levels]
                own_latents = tokenizer.quantize.tokenize(own).reconstructions
        total = images.new_zeros(())
        metrics: dict[str, float] = {}
        for target, image in enumerate(levels):
            outputs: list[Tensor] = []
            with self.autocast():
                if sampled_latents:
                    outputs.append(self.whole.decode(sampled_latents, target, lr[:sampled]).float())
                if own_latents:  # without the LR image, so that the tokenizer stays one by itself
                    outputs.append(tokenizer.decode(own_latents[target], target).float())
            output = self._partly_fixed(torch.cat(outputs), lr, target, generator)
            with self.autocast():
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

    def evaluate(self, model: HitTokenizer) -> dict[str, float]:
        score = PyramidScore(model)
        for i in range(2):
            images, lr, class_id = self.held_out.pairs(i, 16)
            with self.autocast():
                _, latents = self.sampler.sample(self.whole.lr_features(lr), class_id)
                outputs = [
                    model.decode(latent, target, self.whole.lr_image(lr, target))
                    for target, latent in enumerate(latents)
                ]
            score.add(outputs, images)
        return score.means()
