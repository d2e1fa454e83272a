"""HIT-VAR (arXiv 2506.04990)."""

from hitsr_fast.models.hit_var.checkpoints import init_from_public, init_from_var, init_from_varsr, load_vqvae
from hitsr_fast.models.hit_var.config import (
    HIT_D16,
    HIT_D16_11,
    HIT_TINY,
    PRESETS,
    HitConfig,
    TokenizerConfig,
    TransformerConfig,
)
from hitsr_fast.models.hit_var.model import HitVar
from hitsr_fast.models.hit_var.sampler import HitSampler
from hitsr_fast.models.hit_var.tokenizer import HitTokenizer
from hitsr_fast.models.hit_var.transformer import HitTransformer
from hitsr_fast.models.hit_var.upscaler import HitUpscaler

__all__ = [
    "HIT_D16",
    "HIT_D16_11",
    "HIT_TINY",
    "PRESETS",
    "HitConfig",
    "HitSampler",
    "HitTokenizer",
    "HitTransformer",
    "HitUpscaler",
    "HitVar",
    "TokenizerConfig",
    "TransformerConfig",
    "init_from_public",
    "init_from_var",
    "init_from_varsr",
    "load_vqvae",
]
