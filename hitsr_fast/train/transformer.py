"""Stage 2: the transformer learns the HR image's tokens from the LR image's features (HIT-VAR, 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.losses.tokens import token_loss, token_weights
from hitsr_fast.models import HitTokenizer, HitTransformer
from hitsr_fast.train.batches import PairBatches
from hitsr_fast.train.config import TransformerTrainConfig
from hitsr_fast.train.loop import parameter_groups
from hitsr_fast.train.self_correction import code_neighbours, tokenize_with_mistakes
from hitsr_fast.train.stage import Stage


class TransformerStage(Stage[HitTransformer]):
    """Cross entropy over all tokens of the pyramid; tokenizer frozen."""

    name = "transformer"
    config: TransformerTrainConfig

    def __init__(
        self,
        model: HitTransformer,
        tokenizer: HitTokenizer,
        batches: PairBatches,
        held_out: PairBatches,
        config: TransformerTrainConfig,
    ) -> None:
        super().__init__(model, batches, held_out, config)
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        codebook = tokenizer.quantize.codebook
        self.neighbours = code_neighbours(codebook, config.mistake_codes)
        self.token_weight = token_weights(model.scales, config.scale_balance).to(codebook.device)
        if config.head_from_codebook:
            init_head(model, codebook)
        self.score = torch.compile(self._score) if config.compile else self._score

    def optimizers(self) -> list[torch.optim.Optimizer]:
        config = self.config
        named = dict(self.model.named_parameters())
        muon = {
            name: p
            for name, p in named.items()
            if config.muon_lr > 0 and name.startswith("blocks.") and p.ndim == 2 and "ada_lin" not in name
        }
        rest = [(name, p) for name, p in named.items() if name not in muon]
        optimizers = [self.adamw(parameter_groups(rest, config.weight_decay))]
        if muon:
            optimizers.append(
                torch.optim.Muon(muon.values(), lr=config.muon_lr, weight_decay=config.weight_decay)
            )
        return optimizers

    @torch.no_grad()
    def inputs(
        self, step: int, batches: PairBatches, size: int, mistakes: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """LR features, class, teacher inputs and labels of a step."""
        hr, upsampled, class_id = batches(step, size)
        quantizer = self.tokenizer.quantize
        with self.autocast():
            features = self.tokenizer.encode(upsampled.contiguous(memory_format=torch.channels_last)).float()
            latents = [
                self.tokenizer.encode(level.contiguous(memory_format=torch.channels_last)).float()
                for level in self.tokenizer.pyramid(hr)
            ]
        if mistakes > 0:
            generator = torch.Generator().manual_seed(step)
            labels, tokens = tokenize_with_mistakes(quantizer, latents, self.neighbours, mistakes, generator)
        else:
            labels = tokens = quantizer.tokenize(latents).indices
        grid = self.model.config.transformer.ar_grid
        return features, class_id, quantizer.teacher_inputs(tokens, ar_grid=grid), labels

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        features, class_id, inputs, indices = self.inputs(
            step, self.batches, self.config.batch, self.config.mistakes
        )
        torch.manual_seed(step)
        with self.autocast():
            loss, accuracy = self.score(features, class_id, inputs, indices)
        return loss, {"accuracy": accuracy.item()}

    def _score(
        self, features: Tensor, class_id: Tensor, inputs: Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weighted cross entropy and plain accuracy of the model's logits."""
        logits = self.model(features, class_id, inputs)
        loss = token_loss(logits, indices, self.token_weight, self.config.label_smoothing)
        return loss, (logits.detach().argmax(-1) == indices).float().mean()

    def evaluate(self, model: HitTransformer) -> dict[str, float]:
        total, accuracy, count = 0.0, 0.0, 4
        for i in range(count):
            features, class_id, inputs, indices = self.inputs(i, self.held_out, 8, mistakes=0.0)
            with self.autocast():
                logits = model(features, class_id, inputs)
            total += F.cross_entropy(logits.flatten(0, 1), indices.flatten()).item()
            accuracy += (logits.argmax(-1) == indices).float().mean().item()
        return {"held_out_loss": total / count, "held_out_accuracy": accuracy / count}


@torch.no_grad()
def init_head(model: HitTransformer, codebook: Tensor, seed: int = 0) -> None:
    """Start the classifier at logits `(p . e_k - |e_k|^2 / 2) / var`, `p` a random projection of the token.

    `var` is the mean of `|e_k|^2 / 2`, so logits start at the order of one.
    """
    width = model.head.weight.shape[1]
    codes = codebook.detach().float()
    energy = codes.square().sum(1) / 2
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(codes.shape[1], width, generator=generator).to(codes.device) / width**0.5
    model.head.weight.copy_((codes @ projection) * energy.mean().rsqrt())
    model.head.bias.copy_(-energy / energy.mean())
