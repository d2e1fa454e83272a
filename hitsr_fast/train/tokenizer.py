"""Stage 1: the hierarchical tokenizer (HIT-VAR, section 3.1): codebook, phi bank and one decoder a target."""

from __future__ import annotations

import torch
from torch import Tensor

from hitsr_fast.losses.latent import codebook_loss
from hitsr_fast.losses.reconstruction import ReconstructionLoss
from hitsr_fast.models import HitTokenizer
from hitsr_fast.train.autoencoder import PyramidScore, evaluation_images
from hitsr_fast.train.batches import PairBatches
from hitsr_fast.train.config import TokenizerTrainConfig
from hitsr_fast.train.stage import Stage


class TokenizerStage(Stage[HitTokenizer]):
    """Trains codebook and phi on the latent error, the decoders on the image error."""

    name = "tokenizer"
    config: TokenizerTrainConfig

    def __init__(
        self, model: HitTokenizer, batches: PairBatches, held_out: PairBatches, config: TokenizerTrainConfig
    ) -> None:
        super().__init__(model, batches, held_out, config)
        self.distance = ReconstructionLoss(config.loss).to(self.device)
        model.requires_grad_(True)
        model.encoder.requires_grad_(config.train_encoder)
        model.quant_conv.requires_grad_(config.train_encoder)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        named = self.model.named_parameters()
        others = [p for name, p in named if p.requires_grad and not name.startswith("quantize.")]
        codebook_and_phi = list(self.model.quantize.parameters())
        quantizer = {"params": codebook_and_phi, "lr": self.config.codebook_lr, "weight_decay": 0.0}
        return [self.adamw([{"params": others}, quantizer])]

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        config = self.config
        images = self.batches.hr(step, config.batch)
        generator = torch.Generator().manual_seed(step)
        levels = [level.contiguous(memory_format=torch.channels_last) for level in self.model.pyramid(images)]
        with torch.set_grad_enabled(config.train_encoder), self.autocast():
            latents = [self.model.encode(level).float() for level in levels]
        indices, reconstructions = self.model.quantize.tokenize([z.detach() for z in latents])
        commitment = config.commitment if config.train_encoder else 0.0
        total = images.new_zeros(())
        metrics: dict[str, float] = {"codes": float(indices.unique().numel())}
        for target, (image, z, quantized) in enumerate(zip(levels, latents, reconstructions, strict=True)):
            latent_loss = codebook_loss(quantized, z, commitment)
            # Straight through: the encoder takes the gradient of what the decoder sees.
            seen = z + (quantized - z).detach()
            continuous = torch.rand(len(z), 1, 1, 1, generator=generator) < config.continuous_prob
            seen = torch.where(continuous.to(z.device), z, seen)
            with self.autocast():
                image_loss = self.distance(self.model.decode(seen, target), image, generator)
            total = total + (image_loss + config.codebook_weight * latent_loss) / len(levels)
            metrics[f"image_{image.shape[-1]}"] = image_loss.item()
            metrics[f"latent_{image.shape[-1]}"] = latent_loss.item() / (1 + commitment)
        return total, metrics

    def evaluate(self, model: HitTokenizer) -> dict[str, float]:
        score = PyramidScore(model)
        for images in evaluation_images(self.held_out):
            with self.autocast():
                latents = model.tokenize(images).reconstructions
                outputs = [model.decode(latent, target) for target, latent in enumerate(latents)]
            score.add(outputs, images)
        return score.means()
