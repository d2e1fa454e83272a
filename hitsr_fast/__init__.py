"""Image super-resolution by next-scale autoregressive prediction, built on a few fused operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hitsr_fast._lazy import lazy
from hitsr_fast._version import __version__

if TYPE_CHECKING:
    from hitsr_fast.pipeline import HitSR

__all__ = ["HitSR", "__version__"]
__getattr__ = lazy(__name__, pipeline=["HitSR"])
