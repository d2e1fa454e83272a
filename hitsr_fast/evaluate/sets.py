"""Test sets: pairs of a ground truth and an input four times as small."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from hitsr_fast.data.degradation import degrade
from hitsr_fast.imaging.io import ImageFileError, read_picture, to_eight_bit

# The LR image of a pair is this much smaller than the HR image; the largest scale that is scored.
PAIR_SCALE = 4
SCALES = tuple(scale for scale in range(1, PAIR_SCALE + 1) if PAIR_SCALE % scale == 0)

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
# What the usual sets append to an image's name: DIV2K `0801x4`, Set14 `img_001_SRF_4_HR`.
_PAIR_MARK = re.compile(r"(_?x4|_LR4|_HR|_LR)$", re.IGNORECASE)


class EvaluationError(ValueError):
    """A test set or an option with which nothing can be evaluated."""


@dataclass(frozen=True)
class Pair:
    """One test image.

    Args:
        name: the image's name without the marks of HR and LR.
        hr: the ground truth's file.
        lr: the input's file; None when it is made from `hr`.
    """

    name: str
    hr: Path
    lr: Path | None


@dataclass(frozen=True)
class EvalSet:
    """A named list of test images.

    Args:
        name: what the table calls it.
        pairs: its images, in order.
        degrade_seed: seed of the degradation that makes the inputs; None when the pairs have LR files.
    """

    name: str
    pairs: tuple[Pair, ...]
    degrade_seed: int | None = None

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """Read one image pair.

        Args:
            index: position in `pairs`.

        Returns:
            HR float32 `(1, 3, 4h, 4w)` and LR float32 `(1, 3, h, w)`, both RGB in [0, 1] on the 8-bit grid.

        Raises:
            EvaluationError: a file is not an image, or the sizes do not belong together.
        """
        pair = self.pairs[index]
        hr = _read(pair.hr)
        if pair.lr is None:
            if self.degrade_seed is None:
                raise EvaluationError(f"{pair.hr}: no LR image and no seed to make one")
            height, width = (side - side % PAIR_SCALE for side in hr.shape[2:])
            if 0 in (height, width):
                raise EvaluationError(f"{pair.hr}: smaller than {PAIR_SCALE} px")
            hr = hr[..., :height, :width]
            return hr, degrade(hr, self.degrade_seed, scale=PAIR_SCALE, first_index=index)
        lr = _read(pair.lr)
        height, width = (PAIR_SCALE * side for side in lr.shape[2:])
        spare = hr.shape[2] - height, hr.shape[3] - width
        if not all(0 <= pixels < PAIR_SCALE for pixels in spare):
            raise EvaluationError(
                f"{pair.lr}: expected 1/{PAIR_SCALE} of {pair.hr}, which is {hr.shape[3]}x{hr.shape[2]}, "
                f"found {lr.shape[3]}x{lr.shape[2]}"
            )
        return hr[..., :height, :width], lr


def find_set(
    name: str, hr: Path, lr: Path | None = None, *, degrade_seed: int | None = None, limit: int | None = None
) -> EvalSet:
    """Find the image pairs of a test set.

    Args:
        name: what the table calls it.
        hr: folder of the ground truth, or a folder that holds both (`*_HR.png` beside `*_LR.png`, there or
            in a sub-folder `image_SRF_4`).
        lr: folder of the inputs.
        degrade_seed: make the inputs from `hr` by the Real-ESRGAN degradation with this seed.
        limit: keep the first images only.

    Returns:
        The pairs in the order of their names.

    Raises:
        EvaluationError: a folder is missing or empty, or an image has no partner.
    """
    if lr is not None and degrade_seed is not None:
        raise EvaluationError(f"{name}: give either LR images or a degradation, not both")
    if lr is None and (hr / f"image_SRF_{PAIR_SCALE}").is_dir():
        hr = hr / f"image_SRF_{PAIR_SCALE}"
    hr_files = _images(hr)
    if lr is not None:
        lr_files = _images(lr)
    else:
        lr_files = [path for path in hr_files if path.stem.upper().endswith("_LR")]
        hr_files = [path for path in hr_files if path not in lr_files]
    if degrade_seed is not None:
        pairs = [Pair(image, path, None) for image, path in _by_name(hr_files).items()]
    elif not lr_files:
        raise EvaluationError(
            f"{name}: no LR images in {lr or hr}; give an LR folder, or let --degrade make them"
        )
    else:
        pairs = _match(name, _by_name(hr_files), _by_name(lr_files))
    return EvalSet(name, tuple(pairs[:limit]), degrade_seed)


def to_tensor(image: Image.Image | npt.NDArray[np.uint8]) -> Tensor:
    """An 8-bit RGB image as `(1, 3, H, W)` float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def _read(path: Path) -> Tensor:
    try:
        pixels = to_eight_bit(read_picture(path)).pixels
    except ImageFileError as error:
        raise EvaluationError(str(error)) from error
    return to_tensor(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)
    files = [path for path in files if not path.name.startswith(".")]
    if not files:
        raise EvaluationError(f"{folder}: no images")
    return files


def _by_name(files: Sequence[Path]) -> dict[str, Path]:
    """Files by their names without the marks of HR and LR."""
    named: dict[str, Path] = {}
    for path in files:
        name = _PAIR_MARK.sub("", path.stem)
        if name in named:
            raise EvaluationError(f"{path}: has the same name as {named[name].name}")
        named[name] = path
    return named


def _match(name: str, hr: dict[str, Path], lr: dict[str, Path]) -> list[Pair]:
    alone = sorted(str({**hr, **lr}[image]) for image in hr.keys() ^ lr.keys())
    if alone:
        shown = ", ".join(alone[:5]) + (f" and {len(alone) - 5} more" if len(alone) > 5 else "")
        raise EvaluationError(f"{name}: HR and LR images without a partner: {shown}")
    return [Pair(image, hr[image], lr[image]) for image in hr]
