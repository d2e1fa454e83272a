"""What a training run depends on; without torch, so that the command line can list it quickly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from hitsr_fast.configs import Config, Count, Range, Share
from hitsr_fast.losses.config import ReconstructionLossConfig

AnyCount = Annotated[int, Range(0)]
Weight = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open="low")]
BelowOne = Annotated[float, Range(0, 1, open="high")]


@dataclass(frozen=True)
class LoopConfig(Config):
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

    steps: AnyCount = 10_000
    minutes: Positive = math.inf
    warmup: BelowOne = 0.02
    final_lr: Share = 0.02
    clip: Positive = 1.0
    ema: BelowOne = 0.995
    checkpoint_minutes: Weight = 3.0
    log_every: Count = 10
    eval_every: AnyCount = 200


@dataclass(frozen=True)
class StageConfig(Config):
    """What the recipe of every stage has.

    Args:
        batch: Samples a step.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay of what is trained, in the transformer of matrices (HIT-VAR: 0.005).
        dtype: In which convolutions and matrices are multiplied; the rest, and the weights, are float32. auto
            is bfloat16 where the device multiplies it in hardware, else float32.
    """

    batch: Count = 16
    lr: Positive = 5e-4
    weight_decay: Weight = 0.01
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclass(frozen=True)
class ImageStageConfig(StageConfig):
    """What the recipe of a stage has whose loss compares images.

    Args:
        loss: Terms of the image loss.
    """

    loss: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)


@dataclass(frozen=True)
class AutoencoderConfig(ImageStageConfig):
    """Recipe of the autoencoder stage.

    Args:
        lr_share: Share of crops that are replaced by their own degraded, up-sampled low-resolution version,
            so that the encoder also knows the images whose features condition the transformer.
        latent_noise: Largest standard deviation, relative to the latent's own, of the Gaussian noise on the
            latent; stands in for the quantization error to come.
    """

    lr: Positive = 7e-4
    lr_share: Share = 0.25
    latent_noise: Weight = 0.3


@dataclass(frozen=True)
class TokenizerTrainConfig(ImageStageConfig):
    """Recipe of the tokenizer stage.

    Args:
        codebook_lr: Peak learning rate of codebook and phi, which do not decay. 0 keeps them at the k-means
            optimum, where a short run has little to gain.
        train_encoder: Also train the encoder, through the quantizer by straight-through and with the
            commitment term. HIT-VAR freezes the encoder of a trained tokenizer.
        commitment: Weight of the commitment term beside the codebook term (VAR: 0.25); used with
            `train_encoder`.
        codebook_weight: Weight of the codebook's own term, the squared error of the reconstructed latent
            relative to the latent's variance.
        continuous_prob: Chance that a sample's decoder sees the continuous latent instead (HART; HIT-VAR:
            0.5).
    """

    codebook_lr: Weight = 0.0
    train_encoder: bool = False
    commitment: Weight = 0.25
    codebook_weight: Weight = 0.5
    continuous_prob: Share = 0.25


@dataclass(frozen=True)
class TransformerTrainConfig(StageConfig):
    """Recipe of the transformer stage.

    Args:
        muon_lr: Peak learning rate of Muon, which trains the blocks' matrices; 0 trains them with AdamW too.
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

    batch: Count = 8
    lr: Positive = 2e-3
    muon_lr: Weight = 1e-2
    weight_decay: Weight = 0.005
    label_smoothing: Share = 0.0
    head_from_codebook: bool = True
    scale_balance: Weight = 0.75
    mistakes: Share = 0.3
    mistake_codes: Count = 64
    compile: bool = False


@dataclass(frozen=True)
class DecoderTrainConfig(ImageStageConfig):
    """Recipe of the decoder stage.

    Args:
        sampled: Share of samples decoded from tokens that the transformer sampled itself, all scales in a
            row; the rest are decoded from the HR image's own tokens.
        top_k: Codes that the sampled tokens are drawn from; 1 is greedy, 0 draws from all.
        colour_fixed: Share of samples whose loss is taken after the colour fix, as inference applies it by
            default; the rest keep the bare output sound.
    """

    batch: Count = 12
    lr: Positive = 4e-4
    sampled: Share = 0.9
    top_k: AnyCount = 1
    colour_fixed: Share = 0.5


@dataclass(frozen=True)
class Recipe(Config):
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
    seed: AnyCount = 0
    clean_prob: Share = 0.25
    codebook_images: Count = 2048
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    autoencoder_loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=310))
    tokenizer: TokenizerTrainConfig = field(default_factory=TokenizerTrainConfig)
    tokenizer_loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=340))
    transformer: TransformerTrainConfig = field(default_factory=TransformerTrainConfig)
    transformer_loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=2400))
    decoder: DecoderTrainConfig = field(default_factory=DecoderTrainConfig)
    decoder_loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=1200))

    @property
    def losses(self) -> tuple[ReconstructionLossConfig, ...]:
        """The image losses of the stages that have one."""
        return (self.autoencoder.loss, self.tokenizer.loss, self.decoder.loss)
