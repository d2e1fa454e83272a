"""Models that enlarge images, on one shelf: `Model.from_pretrained` loads any of them."""

from hitsr_fast.models.base import CheckpointError, Model, ModelConfig, SuperResolver, register
from hitsr_fast.models.hit_var import (
    PRESETS,
    HitConfig,
    HitSampler,
    HitTokenizer,
    HitTransformer,
    HitUpscaler,
    HitVar,
    TokenizerConfig,
    TransformerConfig,
    init_from_var,
    load_vqvae,
)
from hitsr_fast.models.hub import ModelNotFoundError, find_weights, packaged_models

__all__ = [
    "PRESETS",
    "CheckpointError",
    "HitConfig",
    "HitSampler",
    "HitTokenizer",
    "HitTransformer",
    "HitUpscaler",
    "HitVar",
    "Model",
    "ModelConfig",
    "ModelNotFoundError",
    "SuperResolver",
    "TokenizerConfig",
    "TransformerConfig",
    "find_weights",
    "init_from_var",
    "load_vqvae",
    "packaged_models",
    "register",
]
