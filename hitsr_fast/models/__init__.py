"""Models that enlarge images, on one shelf: `Model.from_pretrained` loads any of them."""

from hitsr_fast.models.base import CheckpointError, Model, ModelConfig, SuperResolver, register
from hitsr_fast.models.hit_var.checkpoints import init_from_var, load_vqvae
from hitsr_fast.models.hit_var.config import PRESETS, HitConfig, TokenizerConfig, TransformerConfig
from hitsr_fast.models.hit_var.model import HitVar
from hitsr_fast.models.hit_var.sampler import HitSampler
from hitsr_fast.models.hit_var.tokenizer import HitTokenizer
from hitsr_fast.models.hit_var.transformer import HitTransformer
from hitsr_fast.models.hit_var.upscaler import HitUpscaler
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
