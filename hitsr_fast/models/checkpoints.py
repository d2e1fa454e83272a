"""The former place of names that `hitsr_fast.models.hit_var` has."""

from hitsr_fast.models.hit_var import init_from_var, load_vqvae

__all__ = ["init_from_var", "load_vqvae"]
