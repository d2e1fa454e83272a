"""Folders and file names of test sets as they are released."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from hitsr_fast.evaluate.errors import EvaluationError

_IMAGE_SUFFIXES: Final = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}

# What sets append to an image's name. DIV2K: `0801` and `0801x4`; RealSR: `Canon_001_HR` and `Canon_001_LR4`;
# DRealSR: `Canon_10_x4` is the HR image of `Canon_10_x1`; Set14: `img_001_SRF_4_HR` and `img_001_SRF_4_LR`.
_PAIR_MARK: Final = re.compile(r"(_?x[1-4]|_HR|_LR[2-4]?)$", re.IGNORECASE)
_LR_MARK: Final = re.compile(r"_LR4?$", re.IGNORECASE)
_OTHER_SCALE: Final = re.compile(r"_LR[23]$", re.IGNORECASE)


class Folders(NamedTuple):
    """Where the two halves of a set lie; one folder may hold both, and either may be missing."""

    hr: Path | None
    lr: Path | None


# Of each release its folders of HR and of LR images; those of one release that exist are one set.
_RELEASES: Final[tuple[tuple[tuple[str | None, str | None], ...], ...]] = (
    (("image_SRF_4", "image_SRF_4"),),  # Set5, Set14, BSD100, Urban100 of SelfExSR
    (("Canon/Test/4", "Canon/Test/4"), ("Nikon/Test/4", "Nikon/Test/4")),  # RealSR
    (("Test_x4/test_HR", "Test_x4/test_LR"),),  # DRealSR
    (("test_HR", "test_LR"),),  # StableSR's crops of RealSR, DRealSR and DIV2K
    (("gt", "lq"),),  # the same, and others
    (("DIV2K_valid_HR", "DIV2K_valid_LR_bicubic/X4"),),
    (("HR", "LR"),),  # VARSR, and what `hitsr-fast pairs` writes
    (("HR", "LR_bicubic/X4"),),
    ((None, "lq"),),  # RealLQ250
    ((None, "LR"),),
)


def released_folders(root: Path, *, needs_lr: bool = True) -> list[Folders]:
    """The folders of a set below `root`; `root` itself, for both halves, where no release is known.

    Without `needs_lr` those of HR images alone: a release's LR images need not be there.
    """
    if not root.is_dir():
        raise EvaluationError(f"{root}: no such folder")
    for release in _RELEASES:
        halves = release if needs_lr else tuple((hr, None) for hr, _ in release if hr)
        found = [
            Folders(root / hr if hr else None, root / lr if lr else None)
            for hr, lr in halves
            if all((root / half).is_dir() for half in (hr, lr) if half)
        ]
        if found:
            return found
    return [Folders(root, root if needs_lr else None)]


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name, and not hidden."""
    return path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, by name; EvaluationError where there is none."""
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder")
    files = sorted(path for path in folder.iterdir() if is_image(path))
    if not files:
        raise EvaluationError(f"{folder}: no images")
    return files


def mixed(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """HR and LR images of one folder by their marks; those of other scales belong to neither."""
    lr = [path for path in files if _LR_MARK.search(path.stem)]
    return [path for path in files if path not in lr and not _OTHER_SCALE.search(path.stem)], lr


def image_name(path: Path) -> str:
    """The name of a file's image: without suffix and marks of HR, LR and scale."""
    return _PAIR_MARK.sub("", path.stem)


def by_stem(files: Sequence[Path]) -> dict[str, Path]:
    """Files by their names without suffix; EvaluationError where two have one name."""
    named: dict[str, Path] = {}
    for path in files:
        if path.stem in named:
            raise EvaluationError(f"{path}: has the same name as {named[path.stem].name}")
        named[path.stem] = path
    return named


def by_name(files: Sequence[Path]) -> dict[str, Path]:
    """Files by the names of their images.

    A mark is only one where all files stay apart without theirs: `box1` and `box2` are two names.

    Raises:
        EvaluationError: two files have one name, marks and all.
    """
    stems = by_stem(files)
    named = {image_name(path): path for path in files}
    return named if len(named) == len(stems) else stems


def by_names(hr: Sequence[Path], lr: Sequence[Path]) -> tuple[dict[str, Path], dict[str, Path]]:
    """HR and LR files by the names of their images, with or without marks: as most of them have a partner.

    Raises:
        EvaluationError: two files of one half have one name, marks and all.
    """
    ways = [(by_stem(hr), by_stem(lr)), (by_name(hr), by_name(lr))]
    ways += [(ways[0][0], ways[1][1]), (ways[1][0], ways[0][1])]
    return max(ways, key=lambda way: len(way[0].keys() & way[1].keys()))


def shown(names: Sequence[str]) -> str:
    """A list of names in a message: the first five."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
