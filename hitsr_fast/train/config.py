"""What a training run depends on; without torch, so that the command line can list it quickly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hitsr_fast.losses.config import ReconstructionLossConfig


def _require(config: object, low: float, high: float, *names: str) -> None:
    """Raise `ValueError` unless low <= value <= high for each named field; NaN is in no range."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            expected = f"a value in [{low:g}, {high:g}]" if high < math.inf else f"at least {low:g}"
            raise ValueError(f"{name}: expected {expected}, found {value}")


def _require_positive(config: object, *names: str) -> None:
    """Raise `ValueError` unless each named field is above 0."""
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise ValueError(f"{name}: expected a value above 0, found {value}")


@dataclass(frozen=True)
class LoopConfig:
    """How long and how to train.

    Args:
        steps: Optimiser steps.
        minutes: Training time after which the run ends even if steps are left; the schedule follows whichever
            of the two is nearer its end. Time spent before a resume counts.
        warmup: Share of the run over which the learning rate rises from 0.
        final_lr: Learning rate at the end over the peak; cosine in between.
        clip: Largest norm of the gradient.
        ema: Decay of the averaged weights, which are what the stage yields.
        checkpoint_minutes: Time between checkpoints.
        log_every: Steps between log lines.
        eval_every: Steps between evaluations; 0 for none.
    """

    steps: int = 10_000
    minutes: float = math.inf
    warmup: float = 0.02
    final_lr: float = 0.02
    clip: float = 1.0
    ema: float = 0.995
    checkpoint_minutes: float = 3.0
    log_every: int = 10
    eval_every: int = 200

    def __post_init__(self) -> None:
        _require(self, 0, math.inf, "steps", "checkpoint_minutes", "eval_every")
        _require(self, 1, math.inf, "log_every")
        _require(self, 0, 1, "final_lr")
        _require_positive(self, "minutes", "clip")
        for name in ("warmup", "ema"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected a value in [0, 1), found {value}")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Recipe of the autoencoder stage.

    Args:
        batch: Crops a step.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay of all trained parameters.
        loss: Terms of the reconstruction loss.
        lr_share: Share of crops that are replaced by their own degraded, up-sampled low-resolution version,
            so that the encoder also knows the images whose features condition the transformer.
        latent_noise: Largest standard deviation, relative to the latent's own, of the Gaussian noise on the
            latent; stands in for the quantization error to come.
    """

    batch: int = 16
    lr: float = 7e-4
    weight_decay: float = 0.01
    loss: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    lr_share: float = 0.25
    latent_noise: float = 0.3

    def __post_init__(self) -> None:
        _require(self, 1, math.inf, "batch")
        _require_positive(self, "lr")
        _require(self, 0, math.inf, "weight_decay", "latent_noise")
        _require(self, 0, 1, "lr_share")


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """Recipe of the tokenizer stage.

    Args:
        batch: Crops a step.
        lr: Peak learning rate of AdamW for the convolutions.
        codebook_lr: The same for codebook and phi. 0 keeps them at the k-means optimum, where a short run has
            little to gain.
        weight_decay: Weight decay of all trained parameters but codebook and phi.
        loss: Terms of the decoders' loss.
        train_encoder: Also train the encoder, through the quantizer by straight-through and with the
            commitment term. HIT-VAR freezes the encoder of a trained tokenizer.
        commitment: Weight of the commitment term beside the codebook term (VAR: 0.25); used with
            `train_encoder`.
        codebook_weight: Weight of the codebook's own term, the squared error of the reconstructed latent
            relative to the latent's variance.
        continuous_prob: Chance that a sample's decoder sees the continuous latent instead (HART; HIT-VAR:
            0.5).
    """

    batch: int = 16
    lr: float = 5e-4
    codebook_lr: float = 0.0
    weight_decay: float = 0.01
    loss: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    train_encoder: bool = False
    commitment: float = 0.25
    codebook_weight: float = 0.5
    continuous_prob: float = 0.25

    def __post_init__(self) -> None:
        _require(self, 1, math.inf, "batch")
        _require_positive(self, "lr")
        _require(self, 0, math.inf, "codebook_lr", "weight_decay", "commitment", "codebook_weight")
        _require(self, 0, 1, "continuous_prob")


@dataclass(frozen=True)
class TransformerTrainConfig:
    """Recipe of the transformer stage.

    Args:
        batch: Samples a step.
        lr: Peak learning rate of AdamW (embeddings, head, vectors).
        muon_lr: Peak learning rate of Muon, which trains the blocks' matrices; 0 trains them with AdamW too.
        weight_decay: Weight decay of matrices (HIT-VAR: 0.005).
        label_smoothing: Of the cross entropy.
        head_from_codebook: Start the classifier so that its logits are negative squared distances of a random
            projection of the token to the codes: near codes then share what is learned from the first step
            on.
        scale_balance: A token of a scale with L tokens weighs L ** -scale_balance, over the mean. 0 is the
            paper's equal weight, under which all steps of x1 together have a thirtieth of the loss.
        mistakes: Largest rate of wrong input tokens (see `self_correction`); 0 is plain teacher forcing.
        mistake_codes: A wrong token is one of this many nearest codes.
        compile: Run the model through `torch.compile`; needs a C++ compiler on the CPU.
    """

    batch: int = 8
    lr: float = 2e-3
    muon_lr: float = 1e-2
    weight_decay: float = 0.005
    label_smoothing: float = 0.0
    head_from_codebook: bool = True
    scale_balance: float = 0.75
    mistakes: float = 0.3
    mistake_codes: int = 64
    compile: bool = False

    def __post_init__(self) -> None:
        _require(self, 1, math.inf, "batch", "mistake_codes")
        _require_positive(self, "lr")
        _require(self, 0, math.inf, "muon_lr", "weight_decay", "scale_balance")
        _require(self, 0, 1, "label_smoothing", "mistakes")


@dataclass(frozen=True)
class DecoderTrainConfig:
    """Recipe of the decoder stage.

    Args:
        batch: Samples a step.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay.
        loss: Terms of the loss.
        sampled: Share of samples decoded from tokens that the transformer sampled itself, all scales in a
            row; the rest are decoded from the HR image's own tokens.
        top_k: Codes that the sampled tokens are drawn from; 1 is greedy, 0 draws from all.
        colour_fixed: Share of samples whose loss is taken after the colour fix, as inference applies it by
            default; the rest keep the bare output sound.
    """

    batch: int = 12
    lr: float = 4e-4
    weight_decay: float = 0.01
    loss: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    sampled: float = 0.9
    top_k: int = 1
    colour_fixed: float = 0.5

    def __post_init__(self) -> None:
        _require(self, 1, math.inf, "batch")
        _require_positive(self, "lr")
        _require(self, 0, math.inf, "weight_decay", "top_k")
        _require(self, 0, 1, "sampled", "colour_fixed")


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on beside the photos.

    Args:
        preset: Name of the model's preset.
        holdout: Stems of the photos that are never trained on; by default those of `recipe.HOLDOUT`.
        seed: Seed of the initial weights, the crops and the degradations.
        clean_prob: Share of clean bilinear pairs.
        codebook_images: Crops whose latents fill the codebook.
        autoencoder: Stage 0.
        autoencoder_loop: Length and pace of stage 0.
        tokenizer: Stage 1.
        tokenizer_loop: Length and pace of stage 1.
        transformer: Stage 2.
        transformer_loop: Length and pace of stage 2.
        decoder: Stage 3.
        decoder_loop: Length and pace of stage 3.
    """

    preset: str = "hit-tiny"
    holdout: tuple[str, ...] | None = None
    seed: int = 0
    clean_prob: float = 0.25
    codebook_images: int = 2048
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    autoencoder_loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=310))
    tokenizer: TokenizerTrainConfig = field(default_factory=TokenizerTrainConfig)
    tokenizer_loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=340))
    transformer: TransformerTrainConfig = field(default_factory=TransformerTrainConfig)
    transformer_loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=2400))
    decoder: DecoderTrainConfig = field(default_factory=DecoderTrainConfig)
    decoder_loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=1200))

    def check(self) -> None:
        """Raise `ValueError` if a value of its own is out of range; the parts check themselves when made."""
        # Not when made, too: of an error in there the command line would show a traceback.
        _require(self, 0, math.inf, "seed")
        _require(self, 0, 1, "clean_prob")
        _require(self, 1, math.inf, "codebook_images")

    @property
    def losses(self) -> tuple[ReconstructionLossConfig, ...]:
        """The image losses of the stages that have one."""
        return (self.autoencoder.loss, self.tokenizer.loss, self.decoder.loss)
