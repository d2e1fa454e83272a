"""Configuration of HIT-VAR, and its presets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from hitsr_fast.configs import Config, Count, Share
from hitsr_fast.models.base import ModelConfig
from hitsr_fast.nn.autoencoder import GROUPS
from hitsr_fast.pyramid import ScalePyramid

UPSCALE = 4  # full side over LR side; the paper trains x4 only


@dataclass(frozen=True)
class TokenizerConfig(Config):
    """Geometry of `HitTokenizer`. The defaults are VAR's `vae_ch160v4096z32` with HIT-VAR's scales (512 px).

    Args:
        code_dim: Width `C` of a code and of the latent map.
        codebook_size: Number of codes `K`.
        channels: Base width of the convolutional autoencoder.
        channel_multipliers: Width of each level over `channels`; each level but the last halves the map.
        residual_blocks: Residual blocks in an encoder level; a decoder level has one more.
        stem_patch: Side of the pixel-unshuffle before the first and after the last convolution; 1 is VAR's
            own.
        linear_skip: Add to the latent a linear map of each stride x stride patch of the image, and to the
            image a linear map of each latent cell: the convolutions learn only what a linear transform cannot
            (DC-AE, arXiv 2410.10733, section 3.2, with learned instead of fixed shortcuts). VAR has none.
        decoder_lr: The decoders also see the low-resolution image, at the output's size, before their finest
            level and through a linear filter at the end: what the image already says need not pass through
            the tokens (StableSR, arXiv 2305.07015, section 3.3, with pixels instead of encoder features).
            HIT-VAR's see tokens only.
        scales: Side of the token map at each step, ascending; the last is the latent's own side.
        targets: Side of each decodable image over the full side, ascending to 1 (HIT-VAR, section 3.1).
        num_phi: Number of phi convolutions shared by the steps (VAR, `share_quant_resi`).
        phi_ratio: Weight of the convolution in phi, `phi(h) = (1 - r) h + r conv(h)`.
        phi_indexing: `"global"` picks phi by the step's place among all steps, so that a shared code means
            the same thing at each target; `"per_target"` picks it by its place among the steps of its target.
        resize_mode: Antialiased filter that makes the images of the smaller targets (unstated in HIT-VAR).
    """

    code_dim: Count = 32
    codebook_size: Count = 4096
    channels: Count = 160
    channel_multipliers: tuple[Count, ...] = (1, 1, 2, 2, 4)
    residual_blocks: Count = 2
    stem_patch: Count = 1
    linear_skip: bool = False
    decoder_lr: bool = False
    scales: tuple[int, ...] = (4, 6, 8, 10, 14, 16, 20, 24, 28, 32)
    targets: tuple[float, ...] = (0.25, 0.5, 1.0)
    num_phi: Count = 4
    phi_ratio: Share = 0.5
    phi_indexing: Literal["global", "per_target"] = "global"
    resize_mode: Literal["bicubic", "area"] = "bicubic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels % GROUPS:
            raise ValueError(f"channels: expected a multiple of {GROUPS}, found {self.channels}")
        if not self.channel_multipliers:
            raise ValueError("channel_multipliers: expected at least one, found ()")
        if list(self.scales) != sorted(set(self.scales)) or not self.scales or self.scales[0] < 1:
            raise ValueError(f"scales: expected ascending sides of at least 1, found {self.scales}")
        if list(self.targets) != sorted(set(self.targets)) or not self.targets or self.targets[-1] != 1.0:
            raise ValueError(f"targets: expected ascending fractions that end at 1.0, found {self.targets}")
        for target in self.targets:
            if target * self.latent_size not in self.scales:
                raise ValueError(
                    f"targets: {target} of the side {self.latent_size} is not one of scales {self.scales}"
                )

    @property
    def stride(self) -> int:
        """Pixels a latent cell covers along one side."""
        halvings = len(self.channel_multipliers) - 1
        return self.stem_patch << halvings

    @property
    def latent_size(self) -> int:
        """Side of the full latent map."""
        return self.scales[-1]

    @property
    def image_size(self) -> int:
        """Side of the full image in pixels."""
        return self.latent_size * self.stride

    @property
    def target_sizes(self) -> tuple[int, ...]:
        """Side of the latent map of each target."""
        return tuple(int(target * self.latent_size) for target in self.targets)

    @cached_property
    def pyramid(self) -> ScalePyramid:
        """Scales and targets; these are made of 3, 6 and 10 steps for HIT-VAR's ten scales (Algorithm 1)."""
        return ScalePyramid(self.scales, self.target_sizes)

    @property
    def scale_factors(self) -> tuple[int, ...]:
        """Side of each target's image over that of the LR image: (1, 2, 4) for targets (1/4, 1/2, 1)."""
        return tuple(round(UPSCALE * target) for target in self.targets)


@dataclass(frozen=True)
class TransformerConfig(Config):
    """Geometry of `HitTransformer`. The defaults are VAR-d16 with HIT-VAR's conditioning.

    Args:
        depth: Number of blocks.
        width: Width of a token.
        heads: Attention heads; `width / heads` is the head dim (64 in VAR).
        mlp_ratio: Hidden width of the feed-forward over `width`.
        attn_l2_norm: Normalise q and k per head and learn the softmax scale (VAR's default).
        position_grid: Side of the learned positional grid, resampled to each scale's side.
        position_resample: How the grid is resampled (unstated in HIT-VAR).
        num_classes: Rows of the class embedding; the last one is the class-free row.
        class_dropout: Probability of the class-free row that the model is meant to be trained with.
        drop_path: Stochastic depth of the last block, rising linearly from 0, likewise.
        ar_grid: `"target"` accumulates the reconstruction that feeds step k on the grid of k's own target;
            `"full"` always on the full grid (plain VAR).
        gate_init: Initial bias of the residual gates. 0 is VAR's; a short run cannot afford to open them
            first.
        prefix_injection: Also add the LR features, area-resampled to a scale's side, to that scale's tokens.
            Not in the paper (off by default); it spares a small model the learning of where to look in the
            prefix.
    """

    depth: Count = 16
    width: Count = 1024
    heads: Count = 16
    mlp_ratio: float = 4.0
    attn_l2_norm: bool = True
    position_grid: Count = 64
    position_resample: Literal["area", "bicubic"] = "area"
    num_classes: Count = 3
    class_dropout: Share = 0.1
    drop_path: Share = 0.0667
    ar_grid: Literal["target", "full"] = "target"
    gate_init: float = 0.0
    prefix_injection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads={self.heads}, found {self.width}")
        if int(self.width * self.mlp_ratio) < 1:
            expected = f"at least 1 / width = 1 / {self.width}"
            raise ValueError(f"mlp_ratio: expected {expected}, found {self.mlp_ratio}")


@dataclass(frozen=True)
class HitConfig(ModelConfig):
    """A whole HIT-VAR model: its tokenizer and its transformer.

    Args:
        model_type: Name of the family.
        name: Name of the preset.
        tokenizer: Geometry of the tokenizer.
        transformer: Geometry of the transformer.
        colour_fix_levels: Dyadic levels of the wavelet colour fix that stay the model's own, a target each,
            coarsest first; what is coarser comes from the input. StableSR and VARSR take 5 at x4.
    """

    model_type: Literal["hit_var"] = "hit_var"
    name: str = "hit-d16"
    tokenizer: TokenizerConfig = TokenizerConfig()
    transformer: TransformerConfig = TransformerConfig()
    colour_fix_levels: tuple[int, ...] = (3, 4, 5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.colour_fix_levels) != len(self.tokenizer.targets) or min(self.colour_fix_levels) < 0:
            raise ValueError(
                f"colour_fix_levels: expected {len(self.tokenizer.targets)} numbers of at least 0, "
                f"found {self.colour_fix_levels}"
            )

    @property
    def lr_tile(self) -> int:
        """Side in pixels of the LR tile that the model takes."""
        return self.tokenizer.image_size // UPSCALE

    @property
    def scale_factors(self) -> tuple[int, ...]:
        """Output side over LR side of each target: (1, 2, 4) for targets (1/4, 1/2, 1)."""
        return self.tokenizer.scale_factors


HIT_D16 = HitConfig()

# With one scale more the targets have steps enough (arXiv 2605.14891, which leaves its side open).
HIT_D16_11 = HitConfig(
    name="hit-d16-11", tokenizer=TokenizerConfig(scales=(4, 6, 8, 10, 14, 16, 20, 24, 28, 30, 32))
)

HIT_TINY = HitConfig(
    name="hit-tiny",
    tokenizer=TokenizerConfig(
        channels=32,
        channel_multipliers=(3, 4),
        residual_blocks=1,
        stem_patch=4,
        linear_skip=True,
        decoder_lr=True,
        scales=(2, 3, 4, 5, 7, 8, 10, 12, 14, 16),
    ),
    transformer=TransformerConfig(
        depth=4, width=256, heads=4, position_grid=24, drop_path=0.0, gate_init=0.5, prefix_injection=True
    ),
    colour_fix_levels=(4, 4, 2),
)

PRESETS = {config.name: config for config in (HIT_D16, HIT_D16_11, HIT_TINY)}
