"""Models that enlarge images, on one shelf: `Model.from_pretrained` loads any of them."""

from hitsr_fast.models.base import Model, ModelConfig, SuperResolver, register
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
    init_from_public,
    init_from_var,
    init_from_varsr,
    load_vqvae,
)
from hitsr_fast.models.hub import ModelNotFoundError, find_weights, packaged_models
from hitsr_fast.models.state_dicts import CheckpointError, read_state

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
    "init_from_public",
    "init_from_var",
    "init_from_varsr",
    "load_vqvae",
    "packaged_models",
    "read_state",
    "register",
]
