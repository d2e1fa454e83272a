"""The transformer learns an image's tokens from its low-resolution version (HIT-VAR, sections 3.2, 3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.losses.preference import preference_loss
from hitsr_fast.losses.tokens import scale_means, token_loss, token_weights
from hitsr_fast.models import HitTransformer, HitVar
from hitsr_fast.models.hit_var.sampler import HitSampler
from hitsr_fast.ops import preference_cross_entropy
from hitsr_fast.train.config import DataConfig, NextScaleConfig, Phase
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.self_correction import code_neighbours, tokenize_with_mistakes
from hitsr_fast.train.task import Batch, Losses
from hitsr_fast.train.tasks.base import HitTask
from hitsr_fast.train.tasks.scores import PyramidScore
from hitsr_fast.transfer import to_device

_ROWS = 1024  # whose logits are there at once in an evaluation


class Inputs(NamedTuple):
    """What the transformer is given, and what it should predict."""

    features: Tensor  # of the LR image, (B, C, h, w)
    class_id: Tensor  # (B,)
    teacher: Tensor  # (B, T - first scale, C)
    labels: Tensor  # (B, T)
    rejected: Tensor | None  # (B, T), the LR image's own tokens


class NextScale(HitTask):
    """Cross entropy over all tokens of the pyramid, and the preference term; tokenizer frozen."""

    parts: ClassVar[Mapping[str, str]] = {"transformer": "transformer"}

    def __init__(
        self, model: HitVar, phase: Phase, data: DataConfig, device: torch.device | str = "cpu"
    ) -> None:
        config = phase.task
        assert isinstance(config, NextScaleConfig)
        super().__init__(model, phase, data, device)
        self.config = config
        codes = self.model.config.tokenizer.codebook_size
        if config.mistakes > 0 and config.mistake_codes >= codes:
            expected = f"fewer than the model's {codes} codes"
            raise ValueError(f"mistake_codes: expected {expected}, found {config.mistake_codes}")
        self.transformer = self.model.transformer.requires_grad_(True)
        self.pyramid = self.model.config.tokenizer.pyramid
        weights = token_weights(self.pyramid.lengths, config.scale_balance)
        self.register_buffer("token_weight", weights.to(self.device), persistent=False)
        self._neighbours: Tensor | None = None

    token_weight: Tensor

    def units(self) -> Sequence[nn.Module]:
        """The blocks."""
        return list(self.transformer.blocks)

    def forward(self, batch: Batch, draw: Draw) -> Losses:
        """Weighted cross entropy plus the weighted preference term."""
        config = self.config
        given = self.inputs(batch, draw, config.mistakes)
        class_id = self._partly_free(given.class_id, draw)
        head = self.transformer.head
        rejected = given.labels if given.rejected is None else given.rejected
        with self.autocast():
            hidden = self.transformer.hidden(
                given.features, class_id, given.teacher, keep=self._kept_branches(draw)
            )
            rows, gaps = preference_cross_entropy(
                hidden.flatten(0, 1),
                head.weight,
                head.bias,
                given.labels.flatten(),
                rejected.flatten(),
                label_smoothing=config.label_smoothing,
            )
        entropy = rows.view_as(given.labels)
        loss = token_loss(entropy, self.token_weight)
        lengths = self.pyramid.lengths
        means = {"cross_entropy": scale_means(entropy.detach(), lengths)}
        if given.rejected is not None:
            gap = gaps.view_as(given.labels)
            term = preference_loss(
                gap, beta=config.preference_beta, reduction=config.preference_reduction
            ) * self._preferring(given.class_id)
            loss = loss + config.preference * term
            equal = (given.labels == given.rejected).float()
            means |= {
                "preference": term.detach().mean(),
                "gap": scale_means(gap.detach(), lengths),
                "equal_tokens": scale_means(equal, lengths),
            }
        return Losses(loss.mean(), means, {})

    @torch.no_grad()
    def inputs(self, batch: Batch, draw: Draw, mistakes: float) -> Inputs:
        """What a batch gives; `mistakes` is the largest rate of wrong input tokens."""
        config, tokenizer = self.config, self.model.tokenizer
        hr, lr, class_id = self.pairs(batch, draw)
        targets = slice(None) if config.hierarchical else slice(-1, None)
        latents = self.latents(self.levels(hr)[targets])
        upsampled = self.upsampled(lr)
        rejected = None
        if config.preference > 0:
            low = self.latents(self.levels(upsampled)[targets])
            features = low[-1]  # the full one, which is the prefix too
            rejected = self._tokens(low)
        else:
            with self.autocast():
                features = tokenizer.encode(upsampled).float()
        if mistakes > 0:
            labels, tokens = tokenize_with_mistakes(
                *(tokenizer.quantize, latents, self.neighbours, mistakes, draw),
                hierarchical=config.hierarchical,
            )
        else:
            labels = tokens = self._tokens(latents)
        grid = self.model.config.transformer.ar_grid
        teacher = tokenizer.quantize.teacher_inputs(tokens, ar_grid=grid)
        return Inputs(features, class_id, teacher, labels, rejected)

    def _tokens(self, latents: Sequence[Tensor]) -> Tensor:
        """By Algorithm 1, or VAR's plain ones of the last latent."""
        quantizer = self.model.tokenizer.quantize
        if self.config.hierarchical:
            return quantizer.tokenize(latents).indices
        return quantizer.quantize(latents[-1]).indices

    @property
    def neighbours(self) -> Tensor:
        """The codes that a wrong token is one of; the codebook does not change."""
        if self._neighbours is None:
            codebook = self.model.tokenizer.quantize.codebook
            self._neighbours = code_neighbours(codebook, self.config.mistake_codes)
        return self._neighbours

    def _partly_free(self, class_id: Tensor, draw: Draw) -> Tensor:
        """Classes, a share of them replaced by the class-free one."""
        free = self.model.config.transformer.num_classes - 1
        return torch.where(draw.uniform("class_dropout") < self.config.class_dropout, free, class_id)

    def _kept_branches(self, draw: Draw) -> Tensor | None:
        """Factors `(depth, 2, B)` of the gates: 0, or 1 over the share that is kept."""
        if self.config.drop_path == 0:
            return None
        depth = len(self.transformer.blocks)
        rates = torch.linspace(0, self.config.drop_path, depth) if depth > 1 else torch.zeros(1)
        kept = to_device(1 - rates, self.device)[:, None, None]
        drawn = draw.uniform("drop_path", depth, 2).permute(1, 2, 0)
        return (drawn < kept) / kept

    def _preferring(self, class_id: Tensor) -> Tensor:
        """1 for the images that have the preference term, 0 for the others: `(B,)`."""
        classes = self.config.preference_classes
        if classes is None:
            return torch.ones_like(class_id, dtype=torch.float32)
        return sum((class_id == one).float() for one in classes) + torch.zeros_like(class_id).float()

    @torch.no_grad()
    def start(self, batches: Iterable[Batch], seed: int = 0) -> dict[str, float]:
        """The classifier from the codebook, where that is asked for."""
        if self.config.head_from_codebook:
            codebook = self.model.tokenizer.quantize.codebook
            init_head(self.transformer, codebook, seed=seed)
        return {}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], draws: Iterable[Draw]) -> dict[str, float]:
        """Plain cross entropy and accuracy under teacher forcing, also a scale.

        Beside them the scores of the images of the first batch that the model itself predicts.
        """
        entropies: list[Tensor] = []
        hits: list[Tensor] = []
        score = PyramidScore(self.sides)
        for number, (batch, draw) in enumerate(zip(batches, draws, strict=False)):
            given = self.inputs(batch, draw, 0.0)
            with self.autocast():
                hidden = self.transformer.hidden(given.features, given.class_id, given.teacher)
            for rows, labels in zip(
                hidden.flatten(0, 1).split(_ROWS), given.labels.flatten().split(_ROWS), strict=True
            ):
                with self.autocast():
                    logits = self.transformer.head(rows).float()
                entropies.append(F.cross_entropy(logits, labels, reduction="none"))
                hits.append((logits.argmax(-1) == labels).float())
            if number == 0:
                images, lr, class_id = self.pairs(batch, draw)
                score.add(self._predicted(lr, class_id), self.levels(images))
        found: dict[str, float] = {}
        for name, parts in (("loss", entropies), ("accuracy", hits)):
            values = torch.cat(parts).view(-1, self.pyramid.num_tokens)
            found[f"held_out_{name}"] = values.mean().item()
            each = scale_means(values, self.pyramid.lengths).tolist()
            found |= {f"held_out_{name}_{i}": value for i, value in enumerate(each)}
        return found | score.means()

    @torch.no_grad()
    def pictures(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """What the model predicts, greedily."""
        images, lr, class_id = self.pairs(batch, draw)
        return self.grid(images, lr, self._predicted(lr, class_id))

    def _predicted(self, lr: Tensor, class_id: Tensor) -> list[Tensor]:
        """Images of LR tiles, one a target, by greedy codes."""
        sampler = HitSampler(self.model, dtype=self.dtype, cuda_graphs=False)  # of the weights of now
        return self.decoded_samples(sampler, lr, class_id)

    def artifact(self) -> dict[str, Tensor]:
        """The transformer."""
        return self.state_of("transformer.")


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
