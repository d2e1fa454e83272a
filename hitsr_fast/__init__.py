"""Image super-resolution by next-scale autoregressive prediction, built on a few fused operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hitsr_fast._version import __version__

if TYPE_CHECKING:
    from hitsr_fast.pipeline import HitSR

__all__ = ["HitSR", "__version__"]


def __getattr__(name: str) -> Any:
    # HitSR pulls in torch: it is imported on first use, so that `hitsr-fast --help` stays quick.
    if name == "HitSR":
        from hitsr_fast.pipeline import HitSR

        return HitSR
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
