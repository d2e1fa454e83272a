"""The former place of names that `hitsr_fast.models.hit_var` has."""

from hitsr_fast.models.hit_var import HitUpscaler

__all__ = ["HitUpscaler"]
