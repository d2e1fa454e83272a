"""Whose weights can be fetched, by the names that `hitsr-fast weights` takes."""

from collections.abc import Mapping
from types import MappingProxyType

from hitsr_fast.metrics.dists import SOURCE as DISTS
from hitsr_fast.metrics.lpips_weights import SOURCE as LPIPS
from hitsr_fast.metrics.niqe import SOURCE as NIQE
from hitsr_fast.metrics.weights import WeightsSource

SOURCES: Mapping[str, WeightsSource] = MappingProxyType(
    {source.name: source for source in (LPIPS, DISTS, NIQE)}
)
