"""What a training run depends on; without torch, so that the command line can list it quickly."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from hitsr_fast.configs import AnyCount, BelowOne, Config, Count, Positive, Range, Share, Weight
from hitsr_fast.data.degradation_config import DegradationName
from hitsr_fast.data.source_config import SourceConfig, check_sources
from hitsr_fast.losses.config import ReconstructionLossConfig

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class DataConfig(Config):
    """What is trained on, beside the photos.

    Args:
        holdout: Stems of the photos that are never trained on. By default those that the package shows, where
            they are there, else every sixteenth by name, at least one.
        clean_prob: Share of clean bilinear pairs (HIT-VAR, section 4.1: at most 0.25).
        degradation: Of the others, one of `hitsr_fast.data.degradation_config.PRESETS`.
        sharp_target: Train towards sharpened photos, by the unsharp mask of Real-ESRGAN, whose pixel and
            perceptual losses do so (its discriminator does not); held-out images are sharpened too.
        workers: Processes that read and crop; 0 does it in the training process.
        prefetch: Batches that a worker makes ahead.
        memory_mib: Decoded photos that all processes of a rank hold together, in MiB.
        sources: What is drawn from, below the folder that a run is given; none is that folder itself.
    """

    holdout: tuple[str, ...] | None = None
    clean_prob: Share = 0.25
    degradation: DegradationName = "real-esrgan"
    sharp_target: bool = False
    workers: AnyCount = 2
    prefetch: Count = 2
    memory_mib: Count = 512
    sources: tuple[SourceConfig, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sources(self.sources)


@dataclass(frozen=True)
class OptimConfig(Config):
    """How weights follow their gradients.

    Args:
        lr: Peak learning rate of AdamW.
        betas: Of AdamW.
        weight_decay: Of what decays by its type (`nn.decay`): matrices and kernels.
        muon_lr: Peak learning rate of Muon, which trains the blocks' matrices; 0: AdamW too.
        quantizer_lr: Peak learning rate of codebook and phi, which do not decay; None is `lr`, 0 freezes.
        clip: Largest norm of the gradient of each group that a task names.
        ema: Decay of the averaged weights, which are what a phase yields; 0 yields the last ones.
    """

    lr: Positive = 5e-4
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    weight_decay: Weight = 0.01
    muon_lr: Weight = 0.0
    quantizer_lr: Weight | None = None
    clip: Positive = 1.0
    ema: BelowOne = 0.995


@dataclass(frozen=True)
class ScheduleConfig(Config):
    """Length of a phase, and its learning rate over the peak, a function of the step alone.

    Args:
        steps: Optimiser steps.
        warmup: Share of the steps over which the rate rises, linearly.
        warmup_from: Rate at step 0 over the peak.
        decay: From the peak to `final_lr`: "cosine", "linear", "lin0" (VAR's: flat for a twentieth of what
            follows the warm-up, then linear) or "constant".
        final_lr: Rate at the end over the peak.
    """

    steps: AnyCount = 10_000
    warmup: BelowOne = 0.02
    warmup_from: Share = 0.0
    decay: Literal["cosine", "linear", "lin0", "constant"] = "cosine"
    final_lr: Share = 0.02


@dataclass(frozen=True)
class ParallelConfig(Config):
    """How a step is spread over processes and memory; changes no result but the order of sums.

    Args:
        strategy: "ddp" copies the model to every process, "fsdp" shards it (`fully_shard`).
        micro_batch: Samples that a process takes at once, the rest of its share being accumulated; 0 takes
            its whole share.
        activation_checkpointing: Compute a block's activations again in the backward pass.
        compile: Run the task through `torch.compile`.
    """

    strategy: Literal["ddp", "fsdp"] = "ddp"
    micro_batch: AnyCount = 0
    activation_checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True)
class PrecisionConfig(Config):
    """In what is multiplied; weights, losses and optimisers are float32.

    Args:
        dtype: Of convolutions and matrices, by autocast; auto is bfloat16 where the device multiplies it in
            hardware, else float32. float16 scales the loss.
        tokens: In which the tokens of the targets are found. bfloat16 gives other tokens (docs/training.md).
    """

    dtype: Dtype = "auto"
    tokens: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class CheckpointConfig(Config):
    """When a run is saved.

    Args:
        minutes: Time between checkpoints.
        every: Steps between checkpoints; 0 goes by time alone.
        keep: How many are kept; at least 2, so that there is one left when the newest cannot be read.
    """

    minutes: Positive = 5.0
    every: AnyCount = 0
    keep: Annotated[int, Range(2)] = 2


@dataclass(frozen=True)
class LogConfig(Config):
    """What a run says of itself.

    Args:
        every: Steps between lines of the log.
        eval_every: Steps between evaluations on held-out photos; 0 for the last step alone.
        images_every: Steps between image grids (LR, x1, x2, x4, HR); 0 for the last step alone.
        tensorboard: Also write TensorBoard's event files; needs the extra `tensorboard`.
        min_usage: Share of the codes in use below which a line warns of collapse.
        mfu: Count a step's FLOPs and measure what the machine's products reach, so that lines have the one
            over the other; takes some 10 s a phase.
    """

    every: Count = 10
    eval_every: AnyCount = 200
    images_every: AnyCount = 0
    tensorboard: bool = False
    min_usage: Share = 0.05
    mfu: bool = True


@dataclass(frozen=True)
class AutoencodeConfig(Config):
    """The autoencoder without quantization, which a codebook is then fitted to.

    Args:
        loss: Terms of the image loss.
        lr_share: Share of crops that are replaced by their own degraded, up-sampled low-resolution version,
            so that the encoder also knows the images whose features condition the transformer.
        latent_noise: Largest standard deviation, relative to the latent's own, of the Gaussian noise on the
            latent; stands in for the quantization error to come.
    """

    kind: Literal["autoencode"] = "autoencode"
    loss: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    lr_share: Share = 0.25
    latent_noise: Weight = 0.3


@dataclass(frozen=True)
class TokenizeConfig(Config):
    """The hierarchical tokenizer (HIT-VAR, section 3.1): codebook, phi and one decoder a target.

    Args:
        loss: Terms of the image loss, summed over the targets.
        codebook_images: Crops whose latents fill the codebook by k-means before the first step; 0 keeps the
            codebook that is there.
        train: What is trained: "all" (encoder too, straight through, with the commitment term), "quantizer
            and decoders" with disjoint gradients, or one of the two alone.
        hierarchical: Quantize the targets in a row, each continuing the tokens of the one before (Algorithm
            1); False is VAR's plain tokenizer, whose only target is the last.
        commitment: Weight of the commitment term beside the codebook term (VAR: 0.25); used with "all".
        codebook_weight: Weight of the codebook's own term, the squared error of the reconstructed latent
            relative to the latent's variance.
        continuous_prob: Chance that a sample's decoder sees the continuous latent instead (HART; HIT-VAR:
            0.5).
        gan_weight: Weight of the decoders' hinge loss against a PatchGAN discriminator; 0 is none.
        gan_from: Step from which that loss counts; the discriminator learns from the first one on.
        revive_below: Replace codes by current residuals where their share of the tokens since the last time
            is below; 0 is never.
        revive_every: Steps from one time to the next.
    """

    kind: Literal["tokenize"] = "tokenize"
    loss: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    codebook_images: AnyCount = 2048
    train: Literal["all", "quantizer and decoders", "quantizer", "decoders"] = "quantizer and decoders"
    hierarchical: bool = True
    commitment: Weight = 0.25
    codebook_weight: Weight = 0.5
    continuous_prob: Share = 0.25
    gan_weight: Weight = 0.0
    gan_from: AnyCount = 0
    revive_below: Share = 0.0
    revive_every: Count = 100


@dataclass(frozen=True)
class NextScaleConfig(Config):
    """The transformer (HIT-VAR, sections 3.2 and 3.3).

    Args:
        label_smoothing: Of the cross entropy.
        hierarchical: Labels by Algorithm 1; False takes VAR's plain residual tokens of the full image.
        preference: Weight of the preference term beside the cross entropy; 0 leaves it out, and with it the
            tokens of the low-resolution image.
        preference_beta: beta of `-log sigmoid(beta * gap)`; the later version of the paper has 0.2.
        preference_reduction: How the gaps of an image's tokens become one.
        preference_classes: Classes of the images that have the term: 0 degraded, 1 clean; by default both.
        class_dropout: Share of images whose class is replaced by the class-free one.
        drop_path: Stochastic depth of the last block, rising linearly from 0.
        head_from_codebook: Start the classifier so that its logits are negative squared distances of a random
            projection of the token to the codes: near codes then share what is learned from the first step
            on.
        scale_balance: A token of a scale with L tokens weighs L ** -scale_balance, over the mean. 0 is the
            paper's equal weight, under which all steps of x1 together have a thirtieth of the loss.
        mistakes: Largest rate of wrong input tokens (see `self_correction`); 0 is plain teacher forcing.
        mistake_codes: A wrong token is one of this many nearest codes.
    """

    kind: Literal["next_scale"] = "next_scale"
    label_smoothing: Share = 0.0
    hierarchical: bool = True
    preference: Weight = 0.0
    preference_beta: Positive = 1.0
    preference_reduction: Literal["mean", "sum"] = "mean"
    preference_classes: tuple[AnyCount, ...] | None = None
    class_dropout: Share = 0.1
    drop_path: Share = 0.0
    head_from_codebook: bool = False
    scale_balance: Weight = 0.0
    mistakes: Share = 0.0
    mistake_codes: Count = 64


@dataclass(frozen=True)
class DecodeConfig(Config):
    """The decoders on what the transformer really predicts, everything else frozen (HiTokSR's last stage).

    Args:
        loss: Terms of the image loss.
        sampled: Share of samples decoded from tokens that the transformer sampled itself, all scales in a
            row; the rest are decoded from the HR image's own tokens.
        top_k: Codes that the sampled tokens are drawn from; 1 is greedy, 0 draws from all.
        colour_fixed: Share of samples whose loss is taken after the colour fix, as inference applies it by
            default; the rest keep the bare output sound.
    """

    kind: Literal["decode"] = "decode"
    loss: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    sampled: Share = 0.9
    top_k: AnyCount = 1
    colour_fixed: Share = 0.5


_FOLDERS = ("model", "tensorboard")  # of a run, beside those of its phases

TaskConfig = AutoencodeConfig | TokenizeConfig | NextScaleConfig | DecodeConfig


@dataclass(frozen=True)
class Phase(Config):
    """A part of a run that has a task, optimisers and a length of its own, and leaves an artifact.

    Args:
        name: Of its folder and its lines in the log.
        task: What is learned.
        init_from: What its weights start from, one after the other: "phase:NAME", "file:PATH" (a folder or
            file that this package wrote) or "public:PATH" (a checkpoint of VAR, Switti or VARSR). What none
            of them has starts at random.
        batch: Samples a step, over all processes.
        optim: Optimisers.
        schedule: Length and learning rate.
        precision: In what is multiplied.
        parallel: How a step is spread.
    """

    name: str = "phase"
    task: TaskConfig = field(default_factory=AutoencodeConfig)
    init_from: tuple[str, ...] = ()
    batch: Count = 16
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", self.name) or self.name in _FOLDERS:
            taken = " and ".join(_FOLDERS)
            raise ValueError(f"name: expected a word in lower case other than {taken}, found {self.name!r}")
        for source in self.init_from:
            if source.partition(":")[0] not in ("phase", "file", "public") or not source.partition(":")[2]:
                expected = '"phase:NAME", "file:PATH" or "public:PATH"'
                raise ValueError(f"init_from: expected {expected}, found {source!r}")


@dataclass(frozen=True)
class Recipe(Config):
    """Everything that a run depends on beside the photos.

    Args:
        name: Of the recipe.
        model: Name of the model's preset, or the path of a `config.json`.
        seed: Of the initial weights and of every draw.
        data: What is trained on.
        phases: One after the other.
        checkpoint: When a run is saved.
        log: What it says of itself.
    """

    name: str = "hit-tiny"
    model: str = "hit-tiny"
    seed: AnyCount = 0
    data: DataConfig = field(default_factory=DataConfig)
    phases: tuple[Phase, ...] = ()
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        names: list[str] = []
        for phase in self.phases:
            if phase.name in names:
                raise ValueError(f"phases: expected names of their own, found {phase.name!r} twice")
            for source in phase.init_from:
                kind, _, name = source.partition(":")
                if kind == "phase" and name not in names:
                    raise ValueError(f"{phase.name}.init_from: expected a phase before it, found {source!r}")
            names.append(phase.name)
