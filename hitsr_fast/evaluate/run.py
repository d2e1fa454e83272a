"""The evaluation job: methods against test sets, scored by PSNR-Y, SSIM-Y and LPIPS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hitsr_fast.evaluate.methods import Method
from hitsr_fast.evaluate.report import Report, Score
from hitsr_fast.evaluate.sets import PAIR_SCALE, SCALES, EvalSet, EvaluationError
from hitsr_fast.metrics import imresize, lpips, psnr_y, ssim_y
from hitsr_fast.metrics.lpips import MIN_SIDE
from hitsr_fast.metrics.lpips_weights import require_weights, weights_path


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
