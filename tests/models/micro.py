"""A model of a few thousand weights with the structure of the real one, and random weights that matter."""

from __future__ import annotations

import torch

from hitsr_fast.models import HitVar
from hitsr_fast.models.hit_var.config import HitConfig, TokenizerConfig, TransformerConfig

MICRO = HitConfig(
    name="micro",
    tokenizer=TokenizerConfig(
        code_dim=6,
        codebook_size=48,
        channels=32,
        channel_multipliers=(1,),
        residual_blocks=1,
        stem_patch=4,
        scales=(1, 2, 3, 4, 6, 8),
        targets=(0.25, 0.5, 1.0),
    ),
    transformer=TransformerConfig(depth=2, width=16, heads=2, position_grid=8, drop_path=0.0),
)


def micro_model(config: HitConfig = MICRO, dtype: torch.dtype = torch.float32, seed: int = 0) -> HitVar:
    """The model in evaluation mode, every parameter drawn anew: none is too small to show in a test."""
    model = HitVar(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        # What tells tokens apart outweighs what they share, or greedy codes would be the same everywhere.
        for own in (model.transformer.word_embed.weight, model.transformer.position_grid):
            own.mul_(10)
    return model.to(dtype).eval()
