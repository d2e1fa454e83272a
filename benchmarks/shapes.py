"""Shapes of the models that benchmarks and tests take their sizes from: once, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from hitsr_fast.models.hit_var.config import HIT_D16, HIT_TINY, HitConfig


@dataclass(frozen=True)
class ModelShape:
    """Geometry of a model over token maps.

    Attributes:
        scales: sides of its token maps; the last is the latent's.
        depth, width, heads: of its transformer.
        prefix: tokens of the condition, which stand in one block with the first scale.
        K, C, G: codes, channels of a code, and groups of its codebook.
        levels: widths of its convolutional autoencoder, finest first; each level but the last halves the map.
    """

    scales: tuple[int, ...]
    depth: int
    width: int
    heads: int
    prefix: int = 0
    K: int = 4096
    C: int = 32
    G: int = 1
    levels: tuple[int, ...] = (160, 160, 320, 320, 640)

    @property
    def D(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    @property
    def lengths(self) -> list[int]:
        """Tokens of each scale."""
        return [side * side for side in self.scales]

    @property
    def tokens(self) -> int:
        """Of all scales."""
        return sum(self.lengths)

    @property
    def blocks(self) -> list[int]:
        """Positions that attend to each other and to those before: the first holds the prefix."""
        return [self.prefix + self.lengths[0], *self.lengths[1:]]

    def step(self, number: int) -> tuple[int, int]:
        """How many positions are before a block, and how many it adds."""
        return sum(self.blocks[:number]), self.blocks[number]

    @property
    def pairs(self) -> int:
        """Pairs of a position and one that it sees."""
        return sum(length * end for length, end in zip(self.blocks, accumulate(self.blocks), strict=True))

    @property
    def maps(self) -> list[tuple[int, int]]:
        """Channels and side of the autoencoder's maps, finest first."""
        return [(C, self.scales[-1] << place) for place, C in enumerate(reversed(self.levels))][::-1]


def _hit(config: HitConfig) -> ModelShape:
    tokenizer, body = config.tokenizer, config.transformer
    return ModelShape(
        scales=tokenizer.scales,
        depth=body.depth,
        width=body.width,
        heads=body.heads,
        prefix=tokenizer.latent_size**2,
        K=tokenizer.codebook_size,
        C=tokenizer.code_dim,
        levels=tuple(tokenizer.channels * factor for factor in tokenizer.channel_multipliers),
    )


_SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

MODELS: Mapping[str, ModelShape] = {
    "var-256": ModelShape((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), depth=16, width=1024, heads=16),
    "var-512": ModelShape(_SCALES_512, depth=36, width=2304, heads=36),
    "varsr": ModelShape(_SCALES_512, depth=24, width=1536, heads=24, prefix=1024),
    "hit-d16": _hit(HIT_D16),
    "hit-tiny": _hit(HIT_TINY),
    # One map, of four codes a token; its autoencoder is a ViT.
    "hitoksr": ModelShape((32,), depth=12, width=768, heads=12, K=1024, C=8, G=4, levels=()),
    # Of no model: shows in no time that everything runs.
    "toy": ModelShape((1, 2, 3, 4, 6, 8), depth=1, width=32, heads=2, prefix=16, K=130, C=8, levels=(10,)),
}
