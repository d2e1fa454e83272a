"""`hitsr-fast pairs`: a set of degraded crops to evaluate on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hitsr_fast.data.degradation_config import DegradationName


@dataclass(frozen=True)
class Pairs:
    """Cut crops out of photos at random places and degrade them: OUT/HR, OUT/LR and OUT/manifest.json.

    The same command goes on where it was interrupted.
    """

    hr: Annotated[Path, tyro.conf.Positional]
    """Folder of photos, as DIV2K_valid_HR."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder of the set."""

    count: int = 3000
    """Pairs to make."""

    crop: int = 512
    """Side of the HR images; that of the LR images is a quarter."""

    seed: int = 0
    """Of the places and the degradation."""

    degradation: DegradationName = "x4plus"
    """Its strengths."""

    def run(self) -> int:
        """Make the pairs, and return the exit code: 0, or 2 when the input is at fault."""
        from hitsr_fast.cli.eval import progress_line
        from hitsr_fast.evaluate import EvaluationError
        from hitsr_fast.evaluate.pair_set import make_pairs
        from hitsr_fast.imaging.io import ImageFileError

        options = {"count": self.count, "crop": self.crop, "seed": self.seed}
        try:
            with progress_line(max(self.count, 0)) as step:
                found = make_pairs(self.hr, self.out, **options, degradation=self.degradation, progress=step)
        except (EvaluationError, ImageFileError, OSError) as error:
            print(f"hitsr-fast pairs: {error}", file=sys.stderr)
            return 2
        for note in found.notes:
            print(f"warning: {note}", file=sys.stderr)
        print(f"{found.made} pairs made, {found.found} there already; digest {found.digest}")
        return 0
