"""`hitsr-fast upscale`: image files in, their restored and enlarged versions out."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from hitsr_fast.cli.options import ModelOptions
from hitsr_fast.imaging.io import MAX_PIXELS, Format, ImageFileError, read_picture
from hitsr_fast.imaging.writing import picture_writers

if TYPE_CHECKING:
    from rich.console import Console

    from hitsr_fast.imaging.sources import Job
    from hitsr_fast.pipeline import HitSR, Progress, UpscaleOptions


@dataclass
class Upscale:
    """Upscale images: each NAME gives NAME_x1 (restored at its own size), NAME_x2 and NAME_x4.

    An image that fails is named on stderr in one line and the others are still done; the exit code is then 2.
    """

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Image files, folders (searched to the bottom; the outputs keep their tree) or glob patterns."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for the outputs; made if it is not there."""

    scales: tuple[int, ...] | None = None
    """Factors of the outputs to write; all that the model has by default."""

    format: Format = "png"
    """File format of the outputs. png and tiff keep 16 bits and are written row by row; jpg and webp are held
    in memory until they are whole."""

    model: str = "hit-tiny"
    """Packaged model, local folder, or hub id (with the `hub` extra)."""

    overlap: int | None = None
    """Input pixels that neighbouring tiles share at least; a quarter of a tile by default."""

    batch: int | None = None
    """Tiles run at once; by default so many that their largest outputs are 2 megapixels, at most 32."""

    max_pixels: int = MAX_PIXELS
    """Refuse larger inputs."""

    overwrite: bool = False
    """Replace outputs that exist already."""

    # Without a name of its own its fields are options of the command.
    how: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)

    def run(self) -> int:
        """Do it; the exit code."""
        from rich.console import Console

        console = Console(stderr=True)
        if not self.inputs:
            return _complain(console, "inputs: expected at least one file, folder or pattern")
        if os.path.isfile(self.output):
            return _complain(console, f"{self.output}: is a file; the outputs need a folder")

        from hitsr_fast.dispatch import BackendUnavailableError
        from hitsr_fast.imaging.sources import find_jobs

        try:
            options = self.how.upscale_options(scales=self.scales, overlap=self.overlap, batch=self.batch)
            sr = self.how.load(self.model)
            sr.plan(1, 1, options)  # options that do not suit the model are one error, not one for each image
        except ValueError as error:
            return _complain(console, str(error))

        jobs, errors = find_jobs(self.inputs, self.output, options.factors(sr.model), self.format)
        for fault in errors:
            _complain(console, str(fault))
        if jobs:
            try:
                self.output.mkdir(parents=True, exist_ok=True)
            except OSError as error:  # said before the work, not after it
                return _complain(console, f"{self.output}: cannot be made: {error.strerror}")
        try:
            failed = len(errors) + self._run_jobs(sr, jobs, options, console)
        except BackendUnavailableError as error:  # no image could do better
            return _complain(console, str(error))
        print(f"{len(jobs) + len(errors) - failed} upscaled into {self.output}, {failed} failed")
        return 2 if failed else 0

    def _run_jobs(self, sr: HitSR, jobs: list[Job], options: UpscaleOptions, console: Console) -> int:
        """Run all jobs under a progress bar; how many failed."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        failed = 0
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            files = bars.add_task("files", total=len(jobs))
            tiles = bars.add_task("tiles", total=None)
            for job in jobs:
                bars.reset(tiles)

                def tiles_done(done: int, total: int) -> None:
                    bars.update(tiles, completed=done, total=total)

                failed += not self._run_job(sr, job, options, console, tiles_done)
                bars.advance(files)
        return failed

    def _run_job(
        self, sr: HitSR, job: Job, options: UpscaleOptions, console: Console, progress: Progress
    ) -> bool:
        """Upscale one image; whether it went well."""
        from hitsr_fast.pipeline import NonFiniteOutputError

        try:
            existing = [target for target in job.targets.values() if os.path.exists(target)]
            if existing and not self.overwrite:
                raise ImageFileError(job.source, f"{existing[0]} exists already (--overwrite replaces it)")
            picture = read_picture(job.source, max_pixels=self.max_pixels)
            for note in picture.notes:
                _say(console, f"note: {job.source}: {note}")
            with picture_writers(job.targets, picture, self.format, overwrite=self.overwrite) as writers:
                for factor, _, rows in sr.stream_picture(picture, options, progress):
                    writers[factor].add_rows(rows)
            for factor, target in job.targets.items():
                print(f"{target}  {picture.width * factor} x {picture.height * factor}", flush=True)
        except ImageFileError as error:
            _complain(console, str(error))
            return False
        except NonFiniteOutputError as error:
            _complain(console, f"{job.source}: {error}")
            return False
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            _complain(console, f"{job.source}: not enough memory")
            return False
        return True


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; on the CPU torch says so with a plain RuntimeError."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _complain(console: Console, text: str) -> int:
    """One line on stderr; the exit code that goes with it."""
    _say(console, f"error: {text}")
    return 2


def _say(console: Console, text: str) -> None:
    console.print(" ".join(text.splitlines()), soft_wrap=True, markup=False, emoji=False, highlight=False)
    sys.stderr.flush()
