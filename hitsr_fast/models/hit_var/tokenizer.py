"""`HitTokenizer`: VAR's VQVAE with HIT-VAR's hierarchical tokenization and one decoder a target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hitsr_fast.models.hit_var.config import TokenizerConfig
from hitsr_fast.nn.autoencoder import Decoder, Encoder, resize
from hitsr_fast.nn.quantizer import ResidualQuantizer
from hitsr_fast.ops import TokenizedPyramid


def enlarged(lr: Tensor, config: TokenizerConfig, target: int) -> Tensor:
    """LR tiles `(B, 3, t, t)` at the side of target number `target`, -1 the last, bilinear (HIT-VAR, 4.1)."""
    side = config.target_sizes[target] * config.stride
    return resize(lr, (side, side), "bilinear")


def quantizer_of(config: TokenizerConfig) -> ResidualQuantizer:
    """The quantizer of a tokenizer."""
    return ResidualQuantizer(
        config.codebook_size,
        config.code_dim,
        config.pyramid,
        phi_ratio=config.phi_ratio,
        num_phi=config.num_phi,
        phi_indexing=config.phi_indexing,
        track_usage=False,
    )


class HitTokenizer(nn.Module):
    """Images to tokens and back, at each target size (HIT-VAR, section 3.1 and Algorithm 1).

    Images are `(B, 3, S, S)` in [-1, 1] with `S = config.image_size` (or a target's share of it); latents are
    `(B, C, S / stride, S / stride)`; both may have any floating dtype, the convolutions run in that of the
    weights; tokens `(B, T)` int64, those of a coarse target the prefix of the finer
    ones'.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        geometry = (
            config.channels,
            config.channel_multipliers,
            config.residual_blocks,
            config.code_dim,
            config.stem_patch,
            config.linear_skip,
        )
        self.encoder = Encoder(*geometry)
        self.quant_conv = nn.Conv2d(config.code_dim, config.code_dim, 3, padding=1)
        self.quantize = quantizer_of(config)
        self.decoders = nn.ModuleList(Decoder(*geometry, config.decoder_lr) for _ in config.targets)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.quant_conv.weight.dtype

    def forward(self, image: Tensor) -> dict[int, Tensor]:
        """Images `(B, 3, S, S)` to tokens and back: `{factor: (B, 3, s S, s S)}`, not clamped."""
        decoded = self.decode_indices(self.tokenize(image).indices)
        return dict(zip(self.config.scale_factors, decoded, strict=True))

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """The image at each target size, coarsest first: `(B, 3, s S, s S)` for `s` in `config.targets`."""
        sides = [size * self.config.stride for size in self.config.target_sizes]
        if image.ndim != 4 or tuple(image.shape[1:]) != (3, sides[-1], sides[-1]):
            raise ValueError(f"image: expected (B, 3, {sides[-1]}, {sides[-1]}), found {tuple(image.shape)}")
        return [resize(image, (side, side), self.config.resize_mode) for side in sides]

    def encode(self, image: Tensor) -> Tensor:
        """Continuous latent `(B, C, h, w)` of images of any side that the stride divides."""
        latent: Tensor = self.quant_conv(self.encoder(image.to(self.dtype)))
        return latent

    def tokenize(self, image: Tensor, *, targets: int | None = None) -> TokenizedPyramid:
        """Tokens of an image by Algorithm 1.

        Args:
            image: `(B, 3, S, S)` in [-1, 1].
            targets: Stop after this many targets, coarsest first; all by default.
        """
        with torch.no_grad():
            latents = [self.encode(level) for level in self.pyramid(image)[:targets]]
        return self.quantize.tokenize(latents)

    def decode(self, reconstruction: Tensor, target: int, lr: Tensor | None = None) -> Tensor:
        """Decode the latent of target number `target`.

        Args:
            reconstruction: `(B, C, h, w)`.
            target: Number of the target, 0 the coarsest.
            lr: `(B, 3, h * stride, w * stride)` in [-1, 1], the low-resolution image that the latent was
                predicted from, for decoders that look at it (`config.decoder_lr`); others leave it aside.

        Returns:
            Image `(B, 3, h * stride, w * stride)`, not clamped.
        """
        seen = None if lr is None else lr.to(self.dtype)
        image: Tensor = self.decoders[target](reconstruction.to(self.dtype), seen)
        return image

    def decode_indices(self, indices: Tensor, targets: Sequence[int] | None = None) -> list[Tensor]:
        """Images that tokens `(B, T)` stand for, one a target number in `targets` (all by default)."""
        chosen = range(len(self.config.targets)) if targets is None else targets
        latents = ((self.quantize.decode(indices, target).reconstruction, target) for target in chosen)
        return [self.decode(latent, target) for latent, target in latents]
