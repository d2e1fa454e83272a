"""`hitsr-fast crops`: cut large photos into sub-images."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Crops:
    """Cut the photos of a folder into overlapping PNG files, so that training reads less for a crop.

    A photo a/b.jpg becomes a/b_s001.png, a/b_s002.png and so on. The same command goes on where it was
    interrupted, cuts again what has changed, and removes the sub-images of photos that are gone.
    manifest.json in the target says what was made of what.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of the photos."""

    target: Annotated[Path, tyro.conf.Positional]
    """Folder of the sub-images, apart from the photos'; made if it is not there."""

    size: int = 512
    """Side of a sub-image in pixels."""

    step: int = 256
    """Pixels from one sub-image to the next; the last of a row or column ends with the photo."""

    workers: int = 2
    """Threads; each holds one photo."""

    def run(self) -> int:
        """Cut, and return the exit code: 0 when all photos are cut, 2 when not."""
        from hitsr_fast.data.tiles import cut_photos

        photos, crops, there, faults = 0, 0, 0, 0
        try:
            for cut in cut_photos(
                self.source, self.target, size=self.size, step=self.step, workers=self.workers
            ):
                photos, crops = photos + 1, crops + len(cut.crops)
                if cut.fault:
                    faults += 1
                    print(
                        f"hitsr-fast crops: photo left out: {self.source / cut.name}: {cut.fault}",
                        file=sys.stderr,
                    )
                elif not cut.made:
                    there += 1
        except (ValueError, OSError) as error:
            print(f"hitsr-fast crops: {error}", file=sys.stderr)
            return 2
        print(
            f"{crops} sub-images of {photos - faults} photos in {self.target}; "
            f"{there} photos were done already"
        )
        return 2 if faults else 0
