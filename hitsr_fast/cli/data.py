"""`hitsr-fast data`: what a data set holds, and what is missing of one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Check:
    """Say which sources of a preset are in a folder, and which are missing.

    Exit code 0 when all are there, 2 when not. Only names of files are looked at, and heads where scores or
    shards need it.
    """

    preset: tyro.conf.Positional[str]
    """Name of a preset (hit, hit-tokenizer, varsr, hitoksr), or a JSON file of the same form."""

    root: tyro.conf.Positional[Path]
    """Folder with the sources' folders."""

    def run(self) -> int:
        from hitsr_fast.data.presets import load_preset
        from hitsr_fast.data.sources import count

        preset, missing = load_preset(self.preset), 0
        for number, source in enumerate(preset.sources):
            expected = preset.expected[number] if preset.expected else "images"
            fault = ""
            try:
                found = count(source, self.root)
                if found < max(source.limit, 1):
                    least = f"{source.limit} images" if source.limit else "at least one image"
                    fault = f"expected {least}, found {found}"
                    fault += f" by the scores of {source.scores}" if source.scores else ""
            except ValueError as error:
                fault = str(error)
            missing += bool(fault)
            if fault:
                print(f"{source.name}: missing: expected {expected} in {self.root / source.path}: {fault}")
            else:
                print(f"{source.name}: {found} images")
        return 2 if missing else 0


@dataclass(frozen=True)
class Manifest:
    """Print the digest of a data set: of its names, sizes, heads and tails; --out writes what it is of."""

    data: tyro.conf.Positional[str]
    """Folder of images, of .tar files or a pattern of those, or hf:NAME[:SPLIT[:COLUMN]]; with --sources the
    root of the sources."""

    sources: tuple[str, ...] = ()
    """Presets or JSON files of their form, whose sources are meant."""

    out: Path | None = None
    """JSON file to write."""

    def run(self) -> int:
        from hitsr_fast.data.manifest import combined, digest_of, write_manifest
        from hitsr_fast.data.presets import sources_of
        from hitsr_fast.data.source_config import SourceConfig
        from hitsr_fast.data.sources import find

        sources = sources_of(self.sources)
        if sources:
            found = [(source.name, find(source, Path(self.data)).photos) for source in sources]
            digests = [(name, digest_of(photos)) for name, photos in found]
            digest = combined(digests)
        else:
            found = [("photos", find(SourceConfig(path=self.data), Path()).photos)]
            digests = [("photos", digest_of(found[0][1]))]
            digest = digests[0][1]
        for (name, photos), (_, own) in zip(found, digests, strict=True):
            print(f"{own}  {name}: {len(photos)} images, {len(photos.faults)} of which cannot be read")
        if sources:
            print(f"{digest}  all")
        if self.out is not None:
            write_manifest(self.out, digest, found)
        return 0


@dataclass(frozen=True)
class Data:
    """Look at a data set: what is missing of a preset's, or the digest of any."""

    command: tyro.conf.OmitArgPrefixes[
        Annotated[Check, tyro.conf.subcommand("check", prefix_name=False)]
        | Annotated[Manifest, tyro.conf.subcommand("manifest", prefix_name=False)]
    ]

    def run(self) -> int:
        """Do it; return the exit code, 2 with a line where an argument or a file is at fault."""
        try:
            return self.command.run()
        except (ValueError, OSError, ModuleNotFoundError) as error:
            print(f"hitsr-fast data: {error}", file=sys.stderr)
            return 2
