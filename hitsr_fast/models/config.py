"""The former place of names that `hitsr_fast.models.hit_var` has."""

from hitsr_fast.models.hit_var import (
    HIT_D16,
    HIT_TINY,
    PRESETS,
    HitConfig,
    TokenizerConfig,
    TransformerConfig,
)

__all__ = ["HIT_D16", "HIT_TINY", "PRESETS", "HitConfig", "TokenizerConfig", "TransformerConfig"]
