"""Test sets: pairs of a ground truth and an input four times as small, or inputs alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from hitsr_fast.data.degradation import degrade
from hitsr_fast.data.degradation_config import PRESETS, DegradationName
from hitsr_fast.evaluate.errors import EvaluationError
from hitsr_fast.evaluate.layouts import by_name, by_names, by_stem, images_in, mixed, released_folders, shown
from hitsr_fast.imaging.io import ImageFileError, picture_size, read_picture, to_eight_bit
from hitsr_fast.metrics import imresize

# The LR image of a pair is this much smaller than the HR image; the largest scale that is scored.
PAIR_SCALE: Final = 4
SCALES: Final = tuple(scale for scale in range(1, PAIR_SCALE + 1) if PAIR_SCALE % scale == 0)


@dataclass(frozen=True)
class Pair:
    """One test image.

    Args:
        name: the image's name without the marks of HR and LR.
        hr: the ground truth's file; None when there is none.
        lr: the input's file; None when it is made from `hr`.
    """

    name: str
    hr: Path | None
    lr: Path | None


class Region(NamedTuple):
    """The part of an input that is evaluated, in its pixels, and the size of the whole input."""

    top: int
    left: int
    height: int
    width: int
    full_height: int
    full_width: int

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut off."""
        return (self.height, self.width) == (self.full_height, self.full_width)

    def cut(self, image: Tensor, scale: int) -> Tensor:
        """That part of `(..., H, W)`, which is `scale` times the whole input."""
        top, left = self.top * scale, self.left * scale
        return image[..., top : top + self.height * scale, left : left + self.width * scale]


class Loaded(NamedTuple):
    """A test image as it is evaluated; see `EvalSet.load`."""

    hr: Tensor | None
    lr: Tensor
    region: Region
    notes: tuple[str, ...]


@dataclass(frozen=True)
class EvalSet:
    """A named list of test images.

    Args:
        name: what the table calls it.
        pairs: its images, in order.
        degrade_seed: seed of the degradation that makes the inputs; None when the pairs have LR files.
        degradation: its strengths, out of `PRESETS`.
        center_crop: side in HR pixels of the central part that is evaluated, a multiple of 4; None for all.
            Images that are smaller along a side keep that side; inputs without ground truth are never
            cropped.
        notes: what is wrong with the set, though not so that it cannot be evaluated.
    """

    name: str
    pairs: tuple[Pair, ...]
    degrade_seed: int | None = None
    degradation: DegradationName = "real-esrgan"
    center_crop: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def has_truth(self) -> bool:
        """Whether there are HR images."""
        return any(pair.hr is not None for pair in self.pairs)

    def load(self, index: int) -> Loaded:
        """Read one image pair.

        Args:
            index: position in `pairs`.

        Returns:
            HR float32 `(1, 3, 4h, 4w)`, or None where there is none, and LR float32 `(1, 3, h, w)`, both
            RGB in [0, 1] on the 8-bit grid; the part that they are of the whole images; and what was done
            to them that is not a matter of course.

        Raises:
            EvaluationError: a file is not an image, or the sizes do not belong together.
        """
        pair = self.pairs[index]
        if pair.hr is None:
            if pair.lr is None:
                raise EvaluationError(f"{self.name}/{pair.name}: neither an HR nor an LR image")
            lr = read_image(pair.lr)
            return Loaded(None, lr, _whole(lr), ())
        hr = read_image(pair.hr)
        if pair.lr is None:
            return self._degraded(pair.hr, hr, index)
        lr, notes = read_image(pair.lr), list[str]()
        if lr.shape == hr.shape and min(hr.shape[2:]) >= PAIR_SCALE:
            # RealSR's first two versions: the LR image is aligned with the HR image pixel by pixel.
            lr = brought_down(_trimmed(lr, pair.lr))
            notes.append(
                f"LR images of the size of HR are brought down to 1/{PAIR_SCALE} by antialiased bicubic"
            )
        height, width = (PAIR_SCALE * side for side in lr.shape[2:])
        spare = hr.shape[2] - height, hr.shape[3] - width
        if not all(0 <= pixels < PAIR_SCALE for pixels in spare):
            raise EvaluationError(
                f"{pair.lr}: expected 1/{PAIR_SCALE} of {pair.hr}, which is {hr.shape[3]}x{hr.shape[2]}, "
                f"found {lr.shape[3]}x{lr.shape[2]}"
            )
        region, smaller = self._region(*lr.shape[2:])
        return Loaded(region.cut(hr, PAIR_SCALE), region.cut(lr, 1), region, (*notes, *smaller))

    def _degraded(self, path: Path, hr: Tensor, index: int) -> Loaded:
        if self.degrade_seed is None:
            raise EvaluationError(f"{path}: no LR image and no seed to make one")
        hr = _trimmed(hr, path)
        region, notes = self._region(hr.shape[2] // PAIR_SCALE, hr.shape[3] // PAIR_SCALE)
        hr = region.cut(hr, PAIR_SCALE)
        config = PRESETS[self.degradation]
        lr = degrade(hr, self.degrade_seed, config=config, scale=PAIR_SCALE, first_index=index)
        return Loaded(hr, lr, region, notes)

    def _region(self, height: int, width: int) -> tuple[Region, tuple[str, ...]]:
        """The centre of an input of that size."""
        if self.center_crop is None:
            return Region(0, 0, height, width, height, width), ()
        side = self.center_crop // PAIR_SCALE
        h, w = min(side, height), min(side, width)
        notes = (f"images below the centre crop of {self.center_crop} px keep their sides",)
        region = Region((height - h) // 2, (width - w) // 2, h, w, height, width)
        return region, notes if min(height, width) < side else ()

    def fingerprint(self, index: int) -> str:
        """Of what `load` gives: of the files' contents, and of what is done to them."""
        pair, digest = self.pairs[index], hashlib.blake2b(digest_size=16)
        for path in (pair.hr, pair.lr):
            try:
                content = b"" if path is None else path.read_bytes()
            except OSError as error:
                raise EvaluationError(f"{path}: {error.strerror or error}") from error
            digest.update(f"{len(content)},".encode() + content)
        made = None if pair.lr is not None else (self.degrade_seed, self.degradation, index)
        digest.update(repr((made, self.center_crop)).encode())
        return digest.hexdigest()


def find_set(
    name: str,
    hr: Path | None,
    lr: Path | None = None,
    *,
    degrade_seed: int | None = None,
    degradation: DegradationName = "real-esrgan",
    center_crop: int | None = None,
    limit: int | None = None,
) -> EvalSet:
    """Find the image pairs of a test set.

    Args:
        name: what the table calls it.
        hr: folder of the ground truth; or, without `lr`, a folder that holds both (`*_HR.png` beside
            `*_LR.png`) or the folders of a release (see `released_folders`); None for inputs without ground
            truth.
        lr: folder of the inputs.
        degrade_seed: make the inputs from `hr` by the Real-ESRGAN degradation with this seed.
        degradation: its strengths, out of `PRESETS`.
        center_crop: see `EvalSet`.
        limit: keep the first images only.

    Returns:
        The pairs in the order of their names. Images without a partner are left out, and one note names them.

    Raises:
        EvaluationError: a folder is missing or empty, two images have one name, or none has a partner.
    """
    if lr is not None and degrade_seed is not None:
        raise EvaluationError(f"{name}: give either LR images or a degradation, not both")
    if degradation not in PRESETS:
        raise EvaluationError(f"degradation: expected one of {', '.join(PRESETS)}, found {degradation!r}")
    if center_crop is not None and (center_crop < PAIR_SCALE or center_crop % PAIR_SCALE):
        raise EvaluationError(f"center_crop: expected a multiple of {PAIR_SCALE} px, found {center_crop}")
    hr_files, lr_files = _files(name, hr, lr, needs_lr=degrade_seed is None)
    notes: tuple[str, ...] = ()
    if degrade_seed is not None:
        pairs = [Pair(image, path, None) for image, path in by_name(hr_files).items()]
    elif not hr_files:
        pairs = [Pair(image, None, path) for image, path in by_stem(lr_files).items()]
    else:
        pairs, notes = _match(name, *by_names(hr_files, lr_files))
    return EvalSet(name, tuple(pairs[:limit]), degrade_seed, degradation, center_crop, notes)


def _files(name: str, hr: Path | None, lr: Path | None, *, needs_lr: bool) -> tuple[list[Path], list[Path]]:
    """The HR and the LR files of a set."""
    if hr is None or lr is not None:
        if lr is None:
            raise EvaluationError(f"{name}: expected a folder, found none")
        return [] if hr is None else images_in(hr), images_in(lr)
    hr_files, lr_files = list[Path](), list[Path]()
    for place in released_folders(hr, needs_lr=needs_lr):
        if place.hr is None or place.lr is None or place.hr != place.lr:
            more_hr = [] if place.hr is None else images_in(place.hr)
            more_lr = [] if place.lr is None else images_in(place.lr)
            if place.lr is None:
                more_hr, _ = mixed(more_hr)
        else:
            more_hr, more_lr = mixed(images_in(place.hr))
            if not more_lr:
                raise EvaluationError(
                    f"{name}: no LR images in {place.hr}; give an LR folder, let --degrade make them, "
                    f"or name it as {name}=:{place.hr} where these are LR images without ground truth"
                )
        hr_files += more_hr
        lr_files += more_lr
    return hr_files, lr_files


def _match(name: str, hr: dict[str, Path], lr: dict[str, Path]) -> tuple[list[Pair], tuple[str, ...]]:
    alone = sorted(str({**hr, **lr}[image]) for image in hr.keys() ^ lr.keys())
    pairs = [Pair(image, path, lr[image]) for image, path in hr.items() if image in lr]
    said = f"{name}: HR and LR images without a partner, left out: {shown(alone)}"
    if not pairs:
        raise EvaluationError(said)
    return pairs, (said,) if alone else ()


def to_tensor(image: Image.Image | npt.NDArray[np.uint8]) -> Tensor:
    """An 8-bit RGB image as `(1, 3, H, W)` float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def read_image(path: Path) -> Tensor:
    """An image file as `(1, 3, H, W)` float32 RGB in [0, 1] on the 8-bit grid; EvaluationError if it is
    none."""
    try:
        pixels = to_eight_bit(read_picture(path)).pixels
    except ImageFileError as error:
        raise EvaluationError(str(error)) from error
    return to_tensor(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def side_of(path: Path) -> int:
    """The shorter side of an image file as its head has it; EvaluationError if it is none."""
    try:
        return min(picture_size(path.read_bytes(), path))
    except (ImageFileError, OSError) as error:
        raise EvaluationError(str(error)) from error


def quantized(image: Tensor) -> Tensor:
    """What is left of an image after it was written to an 8-bit file and read again."""
    return (image.clamp(0, 1) * 255).round() / 255


def brought_down(image: Tensor, factor: int = PAIR_SCALE) -> Tensor:
    """`(1, 3, H, W)` made `factor` times smaller by antialiased bicubic, on the 8-bit grid."""
    return quantized(image if factor == 1 else imresize(image, 1 / factor))


def _whole(lr: Tensor) -> Region:
    height, width = lr.shape[2:]
    return Region(0, 0, height, width, height, width)


def _trimmed(image: Tensor, path: Path) -> Tensor:
    """Without what is left over right and below when the sides are divided by 4."""
    height, width = (side - side % PAIR_SCALE for side in image.shape[2:])
    if 0 in (height, width):
        raise EvaluationError(f"{path}: smaller than {PAIR_SCALE} px")
    return image[..., :height, :width]
