"""The tokenizer: codebook, phi and one decoder a target (HIT-VAR, section 3.1), or VAR's plain one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor

from hitsr_fast.losses.adversarial import discriminator_loss, generator_loss
from hitsr_fast.losses.latent import codebook_loss
from hitsr_fast.losses.reconstruction import ReconstructionLoss, over_targets
from hitsr_fast.models import HitVar
from hitsr_fast.nn.discriminator import PatchDiscriminator
from hitsr_fast.train.codebook import fill_codebook
from hitsr_fast.train.config import DataConfig, Phase, TokenizeConfig
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.task import Batch, Losses
from hitsr_fast.train.tasks.base import HitTask
from hitsr_fast.train.tasks.revival import CodeRevival
from hitsr_fast.train.tasks.scores import PyramidScore


class Tokenize(HitTask):
    """Codebook and phi on the latent error, decoders on the image error; the encoder frozen, or with them.

    With a frozen encoder the two gradients are disjoint: what the decoders see has none.
    """

    parts: ClassVar[Mapping[str, str]] = {
        "encoder": "encoder",
        "quant_conv": "encoder",
        "quantize": "quantizer",
        "decoders": "decoders",
        "discriminator": "discriminator",
    }

    def __init__(
        self, model: HitVar, phase: Phase, data: DataConfig, device: torch.device | str = "cpu"
    ) -> None:
        config = phase.task
        assert isinstance(config, TokenizeConfig)
        images = config.train != "quantizer"
        for name in ("gan_weight", "revive_below"):
            # The inner gradient would run the hooks that gather and free the discriminator's shards; codes
            # are replaced in whole codebooks.
            if getattr(config, name) > 0 and phase.parallel.strategy == "fsdp":
                raise ValueError(f'parallel.strategy: expected "ddp" with {name} above 0, found "fsdp"')
        if config.gan_weight > 0 and not images:
            raise ValueError("gan_weight: expected 0 where no decoder is trained, found another")
        frozen = {"distance": ReconstructionLoss(config.loss)} if images else {}
        super().__init__(model, phase, data, device, **frozen)
        self.config = config
        tokenizer = self.model.tokenizer
        # Also where they are not trained: a start from k-means is part of a checkpoint.
        self.quantize = tokenizer.quantize
        if config.train != "decoders" and self.quantizer_lr > 0:
            self.quantize.requires_grad_(True)
        if images:
            decoders = tokenizer.decoders if config.hierarchical else tokenizer.decoders[-1:]
            self.decoders = self.without_lr(decoders)
        if config.train == "all":
            self.encoder = tokenizer.encoder.requires_grad_(True)
            self.quant_conv = tokenizer.quant_conv.requires_grad_(True)
        if config.gan_weight > 0:
            self.discriminator = PatchDiscriminator().to(self.device)
        self.revival: CodeRevival | None = None
        if config.revive_below > 0:
            if not self.quantize.codebook.requires_grad:
                raise ValueError("revive_below: expected 0 where the codebook is not trained, found another")
            codes = len(self.quantize.codebook)
            revival = CodeRevival(codes, config.revive_below, config.revive_every, phase.batch)
            self.revival = revival.to(self.device)
        count = len(tokenizer.config.targets)
        self.targets = range(count) if config.hierarchical else range(count - 1, count)

    def forward(self, batch: Batch, draw: Draw) -> Losses:
        """Image loss of the decoders plus weighted latent loss of the quantizer, over the targets."""
        config = self.config
        levels = self.levels(self.images(batch))[self.targets.start :]
        latents = self._encoded(levels)
        indices, quantized = self._tokens([latent.detach() for latent in latents])
        means: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for target, image, z, q in zip(self.targets, levels, latents, quantized, strict=True):
            side = image.shape[-1]
            commitment = config.commitment if config.train == "all" else 0.0
            latent_loss = codebook_loss(q, z, commitment)
            means[f"latent_{side}"] = latent_loss.detach().mean() / (1 + commitment)
            loss = config.codebook_weight * latent_loss
            if config.train != "quantizer":
                # Straight through: the encoder takes the gradient of what the decoder sees.
                seen = z + (q - z).detach()
                continuous = draw.uniform(f"continuous/{target}", 1, 1, 1) < config.continuous_prob
                loss = loss + self._image_loss(torch.where(continuous, z, seen), target, image, draw, means)
            losses.append(loss)
        codes = code_counts(indices, self.quantize.pyramid.lengths, len(self.quantize.codebook))
        if self.revival is not None:
            step = self.step_of(draw)
            self.revival.see(self.quantize, self.targets, latents, indices, codes, step, draw)
        return Losses(over_targets(losses, config.loss).mean(), means, {"codes": codes})

    def after_step(self, step: int) -> None:
        """Codes that are hardly used are replaced, where that is asked for."""
        if self.revival is not None:
            self.revival.after_step(self.quantize.codebook, step)

    def _encoded(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Latents, with a gradient where the encoder is trained."""
        if self.config.train != "all":
            return self.latents(levels)
        with self.autocast():
            return [self.model.tokenizer.encode(level).float() for level in levels]

    def _tokens(self, latents: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Tokens, and the reconstruction of each latent with its gradient to codebook and phi."""
        if self.config.hierarchical:
            found = self.quantize.tokenize(latents)
            return found.indices, found.reconstructions
        plain = self.quantize.quantize(latents[-1])
        return plain.indices, [plain.reconstruction]

    def _image_loss(
        self, seen: Tensor, target: int, image: Tensor, draw: Draw, means: dict[str, Tensor]
    ) -> Tensor:
        """Of what a decoder makes of latents, `(B,)`; with the losses against the discriminator."""
        config, side = self.config, image.shape[-1]
        with self.autocast():
            output = self.model.tokenizer.decode(seen, target)
            loss = cast(Tensor, self.frozen.distance(output, image, draw))
        means[f"image_{side}"] = loss.detach().mean()
        if config.gan_weight == 0:
            return loss
        # float16 has no room for the gradients of a discriminator that nothing scales.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            generator = generator_loss(self.discriminator, output.float())
            discriminator = discriminator_loss(self.discriminator, output.float(), image)
        means[f"generator_{side}"] = generator.detach().mean()
        means[f"discriminator_{side}"] = discriminator.detach().mean()
        weight = config.gan_weight if self.step_of(draw) >= config.gan_from else 0.0
        return loss + weight * generator + discriminator

    @torch.no_grad()
    def start(self, batches: Iterable[Batch], seed: int = 0) -> dict[str, float]:
        """The codebook by k-means of the residuals of training crops."""
        wanted = self.config.codebook_images
        if wanted == 0:
            return {}
        found: list[list[Tensor]] = []
        count = 0
        for batch in batches:
            levels = self.levels(self.images(batch))[self.targets.start :]
            found.append(self.latents(levels))
            count += len(batch.images)
            if count >= wanted:
                break
        latents = [torch.cat(level)[:wanted] for level in zip(*found, strict=True)]
        return fill_codebook(self.quantize, latents, seed=seed, hierarchical=self.config.hierarchical)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], draws: Iterable[Draw]) -> dict[str, float]:
        """PSNR-Y and LPIPS of what the tokens of each target decode to."""
        score = PyramidScore(self.sides)
        for batch in batches:
            levels = self.levels(self.images(batch))
            score.add(self._decoded(levels), levels)
        return score.means()

    @torch.no_grad()
    def pictures(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """The images through the tokenizer, at each target size."""
        images, lr, _ = self.pairs(batch, draw)
        return self.grid(images, lr, self._decoded(self.levels(images)))

    def _decoded(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Images from tokens alone, one a target.

        Plain tokens give those of the smaller targets too: the partial reconstruction of the first steps, at
        the target's size, through the one decoder.
        """
        tokenizer, count = self.model.tokenizer, len(levels)
        indices, quantized = self._tokens(self.latents(levels[self.targets.start :]))
        if not self.config.hierarchical:
            quantized = [tokenizer.quantize.decode(indices, target).reconstruction for target in range(count)]
        with self.autocast():
            decoders = range(count) if self.config.hierarchical else [count - 1] * count
            pairs = zip(quantized, decoders, strict=True)
            return [tokenizer.decode(q, decoder).float() for q, decoder in pairs]

    def artifact(self) -> dict[str, Tensor]:
        """The whole tokenizer; the plain one's decoder is that of every target."""
        state = self.state_of("tokenizer.")
        return state if self.config.hierarchical else self.shared_decoder(state, self.targets.start)


def code_counts(indices: Tensor, lengths: Sequence[int], codes: int) -> Tensor:
    """How often each scale took each code: int64 `(S, K)` of tokens `(B, T)`; waits for nothing."""
    rows = [
        torch.zeros(codes, dtype=torch.int64, device=indices.device).scatter_add_(
            0, part.flatten(), torch.ones_like(part).flatten()
        )
        for part in indices.split([*lengths], dim=1)
    ]
    return torch.stack(rows)
