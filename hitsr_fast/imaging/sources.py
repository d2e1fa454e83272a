"""Which images a list of files, folders and glob patterns means, and where their outputs go."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os.path import exists, isdir, realpath
from pathlib import Path
from typing import get_args

from hitsr_fast.imaging.io import Format, ImageFileError

SCALES = (1, 2, 4)

# In a folder only these are taken for images; a file that is named is tried whatever its name.
SUFFIXES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".webp", ".avif", ".tif", ".tiff"}
    | {".gif", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"}
    # Not read without help, but photos all the same: named as errors, not passed over.
    | {".heic", ".heif", ".jxl"}
)


@dataclass(frozen=True)
class Job:
    """An image to upscale and, by factor, the files to write."""

    source: Path
    targets: dict[int, Path]


def find_jobs(
    inputs: Iterable[str], output: Path, scales: Sequence[int], format: Format
) -> tuple[list[Job], list[ImageFileError]]:
    """Find the images to upscale, before any output is written.

    Args:
        inputs: files, folders (to the bottom, hidden and non-image files left out) and glob patterns.
        output: folder of the outputs; those of an input folder keep its tree.
        scales: factors of the outputs.
        format: suffix of the outputs.

    Returns:
        The jobs in the order of the inputs, each image once; and what is wrong: an input that leads to no
        image, or an image whose output would take the place of an input or of another's output.
    """
    jobs: list[Job] = []
    errors: list[ImageFileError] = []
    taken: dict[Path, Path] = {}  # target -> source
    seen: set[str] = set()
    found = [pair for text in inputs for pair in _images_of(text, output, errors)]
    named = {realpath(source) for source, within in found if within is None}
    # Of any scale and format: an earlier run may have been given others.
    outputs = {
        realpath(target): source
        for source, within in found
        for known in get_args(Format)
        for target in _targets(source, within, output, (*SCALES, *scales), known).values()
    }
    for source, within in found:
        resolved = realpath(source)
        if resolved in seen:
            continue
        seen.add(resolved)
        if within is not None and outputs.get(resolved, source) != source:
            continue  # an output of an earlier run into the input folder
        targets = _targets(source, within, output, scales, format)
        others = [taken[target] for target in targets.values() if target in taken]
        if others:
            errors.append(
                ImageFileError(source, f"its outputs would have the same names as those of {others[0]}")
            )
        elif any(realpath(target) in named for target in targets.values()):
            errors.append(ImageFileError(source, f"its outputs in {output} would replace an input"))
        else:
            taken.update(dict.fromkeys(targets.values(), source))
            jobs.append(Job(source, targets))
    return jobs, errors


def _targets(
    source: Path, within: Path | None, output: Path, scales: Sequence[int], format: Format
) -> dict[int, Path]:
    folder = output if within is None else output / within
    return {factor: folder / f"{source.stem}_x{factor}.{format}" for factor in scales}


def _images_of(text: str, output: Path, errors: list[ImageFileError]) -> list[tuple[Path, Path | None]]:
    """(image, its folder below the input folder, or None for a file that was named) of one argument."""
    path = Path(text)
    if not text:
        errors.append(ImageFileError("''", "is no name of a file or folder"))
        return []
    # os.path rather than Path, here and below: no exception for names too long or loops of links.
    if isdir(text):
        faults = len(errors)
        images = _images_in(path, output, errors)
        if not images and len(errors) == faults:
            errors.append(ImageFileError(path, "no images in this folder"))
        return images
    if not exists(text) and glob.has_magic(text):
        matches = sorted(glob.glob(text, recursive=True))
        if not matches:
            errors.append(ImageFileError(path, "no file matches this pattern"))
        return [pair for match in matches for pair in _images_of(match, output, errors)]
    return [(path, None)]


def _images_in(folder: Path, output: Path, errors: list[ImageFileError]) -> list[tuple[Path, Path | None]]:
    images: list[tuple[Path, Path | None]] = []

    def unreadable(error: OSError) -> None:
        errors.append(ImageFileError(error.filename, f"cannot be read: {error.strerror}"))

    for here, folders, files in os.walk(folder, onerror=unreadable):
        place = Path(here)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name != "__MACOSX" and realpath(place / name) != realpath(output)
        )
        images += [
            (place / name, place.relative_to(folder))
            for name in sorted(files)
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return images
