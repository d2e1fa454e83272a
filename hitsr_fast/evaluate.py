"""The evaluation job: methods against test sets, scored by PSNR-Y, SSIM-Y and LPIPS."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from hitsr_fast.data.degradation import degrade
from hitsr_fast.imaging.io import ImageFileError, read_picture, to_eight_bit
from hitsr_fast.metrics import imresize, lpips, psnr_y, ssim_y
from hitsr_fast.metrics.lpips import MIN_SIDE
from hitsr_fast.metrics.lpips_weights import require_weights, weights_path
from hitsr_fast.pipeline import HitSR, UpscaleOptions

# The LR image of a pair is this much smaller than the HR image; the largest scale that is scored.
PAIR_SCALE = 4
SCALES = (1, 2, 4)

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
# What the usual sets append to an image's name: DIV2K `0801x4`, Set14 `img_001_SRF_4_HR`.
_PAIR_MARK = re.compile(r"(_?x4|_LR4|_HR|_LR)$", re.IGNORECASE)


class EvaluationError(ValueError):
    """A test set or an option with which nothing can be evaluated."""


class Method(Protocol):
    """Anything that makes larger images from an LR image: implement this to compare another peer."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        ...

    def upscale(self, lr: Tensor, scales: Sequence[int]) -> dict[int, Tensor]:
        """Restore an LR image at several scales.

        Args:
            lr: float32 `(1, 3, h, w)`, RGB in [0, 1], on the evaluation's device.
            scales: the factors wanted, out of `SCALES`.

        Returns:
            For each scale `s` a floating-point `(1, 3, s h, s w)`, RGB in [0, 1].
        """
        ...


class Bicubic:
    """Pillow's bicubic interpolation: the baseline of every table. Scale 1 is the LR image itself."""

    name = "bicubic"

    def upscale(self, lr: Tensor, scales: Sequence[int]) -> dict[int, Tensor]:
        """As `Method.upscale`."""
        image = Image.fromarray((lr[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy())
        size = {scale: (image.width * scale, image.height * scale) for scale in scales}
        resized = {scale: image.resize(size[scale], Image.Resampling.BICUBIC) for scale in scales}
        return {scale: _to_tensor(result).to(lr.device) for scale, result in resized.items()}


class HitSRMethod:
    """A HIT-VAR model as a method.

    Args:
        name: what the table calls it.
        model: the model.
        options: how to upscale; its `scales` are those of the evaluation.
    """

    def __init__(self, name: str, model: HitSR, options: UpscaleOptions | None = None) -> None:
        self.name = name
        self._model = model
        self._options = options if options is not None else UpscaleOptions()

    def upscale(self, lr: Tensor, scales: Sequence[int]) -> dict[int, Tensor]:
        """As `Method.upscale`."""
        options = {option.name: getattr(self._options, option.name) for option in fields(UpscaleOptions)}
        out = self._model.upscale(lr, **(options | {"scales": scales}))
        results = {1: out.x1, 2: out.x2, 4: out.x4}
        return {scale: result for scale, result in results.items() if result is not None}


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


@dataclass(frozen=True)
class Score:
    """The result of a method on one image.

    Args:
        set: the test set.
        scale: size of the result over size of the input.
        method: the method.
        image: the image.
        psnr_y: dB on luma, infinite for equal images.
        ssim_y: on luma; NaN where the image is too small for the metric.
        lpips: AlexNet; NaN where the image is too small for the metric.
    """

    set: str
    scale: int
    method: str
    image: str
    psnr_y: float
    ssim_y: float
    lpips: float


@dataclass(frozen=True)
class MeanScore:
    """The mean result of a method on a set; as `Score`, with the number of images in place of the image."""

    set: str
    scale: int
    method: str
    images: int
    psnr_y: float
    ssim_y: float
    lpips: float


@dataclass(frozen=True)
class Report:
    """All results of an evaluation.

    Args:
        scores: one per set, image, scale and method.
        notes: what was left out and why.
        settings: what the results depend on besides methods and images; kept in the JSON file.
    """

    scores: tuple[Score, ...]
    notes: tuple[str, ...]
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def means(self) -> list[MeanScore]:
        """Means over the images of each set, scale and method, in the order of their first appearance."""
        groups: dict[tuple[str, int, str], list[Score]] = {}
        for score in self.scores:
            groups.setdefault((score.set, score.scale, score.method), []).append(score)
        return [
            MeanScore(
                *key,
                images=len(group),
                psnr_y=_mean([score.psnr_y for score in group]),
                ssim_y=_mean([score.ssim_y for score in group]),
                lpips=_mean([score.lpips for score in group]),
            )
            for key, group in sorted(groups.items(), key=lambda item: self._rank(item[0]))
        ]

    def _rank(self, key: tuple[str, int, str]) -> tuple[int, int, int]:
        name, scale, method = key
        sets = list(dict.fromkeys(score.set for score in self.scores))
        methods = list(dict.fromkeys(score.method for score in self.scores))
        return sets.index(name), scale, methods.index(method)

    def save(self, path: Path) -> None:
        """Write the report in the format that the suffix of `path` names; never half of it.

        Args:
            path: `.json` (means, images and notes), `.csv` or `.md` (means).

        Raises:
            EvaluationError: another suffix.
        """
        check_report_path(path)
        write = {".json": self._json, ".csv": self._csv, ".md": self.markdown}[path.suffix]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(write(), encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def markdown(self) -> str:
        """The means as a Markdown table."""
        lines = ["| set | scale | method | images | PSNR-Y | SSIM-Y | LPIPS |", "| --- " * 7 + "|"]
        lines += ["| " + " | ".join(format_mean(score)) + " |" for score in self.means()]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([column.name for column in fields(MeanScore)])
        writer.writerows(asdict(score).values() for score in self.means())
        return text.getvalue()

    def _json(self) -> str:
        means = [dict(_plain(score)) for score in self.means()]
        images = [dict(_plain(score)) for score in self.scores]
        return (
            json.dumps(
                {"means": means, "images": images, "notes": self.notes, "settings": dict(self.settings)},
                indent=1,
                allow_nan=False,
            )
            + "\n"
        )


def check_report_path(path: Path) -> None:
    """Raise EvaluationError unless the suffix of `path` names a format that `Report.save` writes."""
    if path.suffix not in (".json", ".csv", ".md"):
        raise EvaluationError(f"{path}: expected a name that ends in .json, .csv or .md")


def format_mean(score: MeanScore) -> tuple[str, ...]:
    """The cells of the table's row: set, scale, method, images, PSNR-Y, SSIM-Y, LPIPS."""
    numbers = f"{score.psnr_y:.2f}", f"{score.ssim_y:.4f}", f"{score.lpips:.4f}"
    return (
        score.set,
        f"x{score.scale}",
        score.method,
        str(score.images),
        *(n.replace("nan", "-") for n in numbers),
    )


def evaluate(
    sets: Sequence[EvalSet],
    methods: Sequence[Method],
    *,
    scales: Sequence[int] = SCALES,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Score methods on test sets.

    Args:
        sets: the test sets.
        methods: the methods; `Bicubic` is among them by custom, not by force.
        scales: the factors to score, out of `SCALES`.
        device: where methods and metrics run.
        progress: called with the name of each image before its work starts.

    Returns:
        One score per set, image, scale and method. The ground truth of scale 4 is the HR image; of 2 and 1 it
        is the HR image scaled down by antialiased bicubic. Results and ground truth are rounded to 8 bit; a
        border of as many pixels as the scale is left out of PSNR and SSIM.

    Raises:
        EvaluationError: an unknown scale, two methods or sets of one name, or a result of the wrong size.
        LpipsWeightsNotFoundError: LPIPS has no weights; the message names the command that fetches them.
    """
    unknown = [scale for scale in scales if scale not in SCALES]
    if unknown or not scales:
        raise EvaluationError(f"scales: expected some of {SCALES}, found {tuple(scales)}")
    for kind, names in (("method", [m.name for m in methods]), ("set", [s.name for s in sets])):
        if len(set(names)) < len(names):
            raise EvaluationError(f"{kind}s: expected different names, found {names}")
    require_weights(weights_path())
    scales = sorted(set(scales))
    scores: list[Score] = []
    notes: dict[str, None] = {}
    with torch.inference_mode():
        for eval_set in sets:
            for index, pair in enumerate(eval_set.pairs):
                if progress is not None:
                    progress(f"{eval_set.name} {pair.name}")
                hr, lr = (image.to(device) for image in eval_set.load(index))
                truths = {scale: _quantize(_shrink(hr, PAIR_SCALE // scale)) for scale in scales}
                for method in methods:
                    results = method.upscale(lr, scales)
                    for scale, truth in truths.items():
                        where = f"{method.name} on {eval_set.name}/{pair.name} x{scale}"
                        result = _checked(where, results.get(scale), truth)
                        values, missing = _measure(result, truth, border=scale)
                        notes |= {f"{eval_set.name}/{pair.name} x{scale}: {note}": None for note in missing}
                        scores.append(Score(eval_set.name, scale, method.name, pair.name, *values))
    return Report(tuple(scores), tuple(notes))


def _measure(result: Tensor, truth: Tensor, *, border: int) -> tuple[tuple[float, float, float], list[str]]:
    """PSNR-Y, SSIM-Y and LPIPS of one image; NaN, with a reason, where it is too small for one."""
    side = min(truth.shape[2:])
    values, missing = [], []
    needs: list[tuple[str, int, Callable[[], Tensor]]] = [
        ("PSNR-Y", 1 + 2 * border, lambda: psnr_y(result, truth, border)),
        ("SSIM-Y", 11 + 2 * border, lambda: ssim_y(result, truth, border)),
        ("LPIPS", MIN_SIDE["alex"], lambda: lpips(result * 2 - 1, truth * 2 - 1)),
    ]
    for name, smallest, measure in needs:
        if side < smallest:
            values.append(math.nan)
            missing.append(f"{name} needs sides of {smallest} px, found {side}")
        else:
            values.append(measure().item())
    return (values[0], values[1], values[2]), missing


def _checked(where: str, result: Tensor | None, truth: Tensor) -> Tensor:
    if result is None:
        raise EvaluationError(f"{where}: no result")
    if result.shape != truth.shape:
        raise EvaluationError(f"{where}: expected shape {tuple(truth.shape)}, found {tuple(result.shape)}")
    if not result.isfinite().all():
        raise EvaluationError(f"{where}: the result has values that are not finite")
    return _quantize(result.to(truth))


def _shrink(image: Tensor, factor: int) -> Tensor:
    return image if factor == 1 else imresize(image, 1 / factor)


def _quantize(image: Tensor) -> Tensor:
    """What is left of an image after it was written to an 8-bit file and read again."""
    return (image.clamp(0, 1) * 255).round() / 255


def _to_tensor(image: Image.Image | npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def _read(path: Path) -> Tensor:
    try:
        pixels = to_eight_bit(read_picture(path)).pixels
    except ImageFileError as error:
        raise EvaluationError(str(error)) from error
    return _to_tensor(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


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


def _mean(values: Sequence[float]) -> float:
    """Mean of the measured values; NaN when none was measured."""
    measured = [value for value in values if not math.isnan(value)]
    return math.fsum(measured) / len(measured) if measured else math.nan


def _plain(score: Score | MeanScore) -> Iterator[tuple[str, str | int | float | None]]:
    """Fields of a score in strict JSON: null where nothing was measured, "inf" for infinity."""
    for key, value in asdict(score).items():
        if isinstance(value, float) and not math.isfinite(value):
            value = None if math.isnan(value) else "inf"
        yield key, value
