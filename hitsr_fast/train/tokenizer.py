"""Stage 1: the hierarchical tokenizer (HIT-VAR, section 3.1): codebook, phi bank and one decoder a target."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.losses.reconstruction import ReconstructionLoss
from hitsr_fast.models import HitTokenizer
from hitsr_fast.train.autoencoder import PyramidScore, evaluation_images
from hitsr_fast.train.batches import PairBatches
from hitsr_fast.train.config import TokenizerTrainConfig


class TokenizerStage:
    """Trains codebook and phi on the latent error, the decoders on the image error; bf16 autocast."""

    name = "tokenizer"

    def __init__(
        self, model: HitTokenizer, batches: PairBatches, held_out: PairBatches, config: TokenizerTrainConfig
    ) -> None:
        self.model: nn.Module = model
        self.tokenizer = model
        self.batches = batches
        self.held_out = held_out
        self.config = config
        self.distance = ReconstructionLoss(config.loss).to(batches.device)
        model.requires_grad_(True)
        model.encoder.requires_grad_(config.train_encoder)
        model.quant_conv.requires_grad_(config.train_encoder)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        config = self.config
        quantizer = list(self.tokenizer.quantize.parameters())
        others = [
            p
            for name, p in self.model.named_parameters()
            if p.requires_grad and not name.startswith("quantize.")
        ]
        groups = [
            {"params": others, "weight_decay": config.weight_decay},
            {"params": quantizer, "lr": config.codebook_lr, "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.95))]

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        config = self.config
        images = self.batches.hr(step, config.batch)
        generator = torch.Generator().manual_seed(step)
        levels = [
            level.contiguous(memory_format=torch.channels_last) for level in self.tokenizer.pyramid(images)
        ]
        with torch.set_grad_enabled(config.train_encoder), torch.autocast(images.device.type, torch.bfloat16):
            latents = [self.tokenizer.encode(level).float() for level in levels]
        indices, reconstructions = self.tokenizer.quantize.tokenize([z.detach() for z in latents])
        total = images.new_zeros(())
        metrics: dict[str, float] = {"codes": float(indices.unique().numel())}
        for target, (image, z, quantized) in enumerate(zip(levels, latents, reconstructions, strict=True)):
            variance = z.detach().var()
            codebook_loss = F.mse_loss(quantized, z.detach()) / variance
            seen = quantized.detach()
            if config.train_encoder:
                codebook_loss = codebook_loss + config.commitment * F.mse_loss(z, seen) / variance
                seen = z + (seen - z).detach()
            continuous = torch.rand(len(z), 1, 1, 1, generator=generator) < config.continuous_prob
            seen = torch.where(continuous.to(z.device), z, seen)
            with torch.autocast(images.device.type, torch.bfloat16):
                image_loss = self.distance(self.tokenizer.decode(seen, target), image, generator)
            total = total + (image_loss + config.codebook_weight * codebook_loss) / len(levels)
            metrics[f"image_{image.shape[-1]}"] = image_loss.item()
            metrics[f"latent_{image.shape[-1]}"] = (F.mse_loss(quantized, z) / variance).item()
        return total, metrics

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, HitTokenizer)
        score = PyramidScore(model)
        for images in evaluation_images(self.held_out):
            with torch.autocast(images.device.type, torch.bfloat16):
                _, reconstructions = model.tokenize(images)
            score.add(reconstructions, images)
        return score.means()
