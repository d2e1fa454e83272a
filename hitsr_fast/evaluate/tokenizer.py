"""How well a tokenizer gives images back: at each target, by plain scale lists and by Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hitsr_fast.evaluate.errors import EvaluationError
from hitsr_fast.evaluate.frechet import FD_VGG, VggFeatures, frechet_distance
from hitsr_fast.evaluate.layouts import shown
from hitsr_fast.evaluate.names import check_names
from hitsr_fast.evaluate.protocols import Column
from hitsr_fast.evaluate.report import Cells, Report, Row, Score, left_out
from hitsr_fast.evaluate.sets import EvalSet, quantized, read_image, side_of
from hitsr_fast.models import HitVar


class CodeUse(NamedTuple):
    """How a scheme uses the codebook at one scale of a target.

    `used` of `codes` codes are hit by `tokens` tokens; `perplexity` is the exponential of their entropy in
    nats.
    """

    set: str
    scheme: str
    factor: int
    side: int
    tokens: int
    used: int
    codes: int
    perplexity: float


@dataclass(frozen=True)
class TokenizerReport:
    """Scores by set, target and scheme, and the use of codes by scale."""

    report: Report
    usage: tuple[CodeUse, ...]


def evaluate_tokenizer(
    model: HitVar,
    sets: Sequence[EvalSet],
    columns: Sequence[Column],
    *,
    device: torch.device | str = "cpu",
    fd_vgg: bool = True,
    progress: Callable[[str], None] | None = None,
) -> TokenizerReport:
    """Tokenize the central crop of each HR image, decode it, and compare.

    Args:
        model: on `device`.
        sets: whose HR images are taken; those smaller than the model's image are left out, and a note names
            them.
        columns: that compare an image with another, or see one alone.
        device: where everything runs.
        fd_vgg: also the Fréchet distance of VGG16 features, see `frechet`.
        progress: called with the name of each image before its work starts.

    Returns:
        Scores, whose scale is the target's factor and whose method is a scheme. "plain" tokenizes the image
        of each target by itself, with the scales up to that target, as VAR does; "Algorithm 1" is
        HIT-VAR's, in which the tokens of a target are the first ones of the next. The ground truth of a
        target is the HR image at its size, as the tokenizer makes it. Decoders that see a low-resolution
        image are given that of the smallest target, which is the model's input at inference.

    Raises:
        EvaluationError: before any work where two sets have one name, or a set has no HR images or none that
            is large enough.
    """
    tokenizer, config = model.tokenizer, model.config.tokenizer
    side, factors = config.image_size, config.scale_factors
    check_names("set", [eval_set.name for eval_set in sets])
    small = {eval_set.name: _small(eval_set, side) for eval_set in sets}
    features = VggFeatures(device) if fd_vgg else None
    scores, notes, usage = list[Score](), list[str](), list[CodeUse]()
    set_values: dict[Row, dict[str, float]] = {}
    for eval_set in sets:
        counts: dict[tuple[str, int], Tensor] = {}
        seen: dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]] = {}
        missing: dict[tuple[int, str], dict[str, None]] = {}
        for pair in eval_set.pairs:
            if progress is not None:
                progress(f"{eval_set.name}/{pair.name}")
            if pair.name in small[eval_set.name]:
                continue
            assert pair.hr is not None
            hr = read_image(pair.hr).to(device)
            top, left = ((length - side) // 2 for length in hr.shape[2:])
            image = hr[..., top : top + side, left : left + side] * 2 - 1
            with torch.inference_mode():
                levels = tokenizer.pyramid(image)
                found = {"plain": _plain(model, levels), "Algorithm 1": _hierarchical(model, image, levels)}
                for scheme, results in found.items():
                    for target, (indices, output) in enumerate(results):
                        key = scheme, target
                        _count(counts, key, indices, config.codebook_size, config.pyramid.ends)
                        result = quantized(output.float() * 0.5 + 0.5)
                        truth = quantized(levels[target].float() * 0.5 + 0.5)
                        values = {}
                        for column in columns:
                            values[column.key], reason = column.measure(result, truth, factors[target])
                            if reason is not None:
                                missing.setdefault((factors[target], reason), {})[pair.name] = None
                        scores.append(Score(eval_set.name, factors[target], scheme, pair.name, values))
                        if features is not None:
                            ours, theirs = seen.setdefault(key, ([], []))
                            ours.append(features(result))
                            theirs.append(features(truth))
        if few := small[eval_set.name]:
            notes.append(f"{eval_set.name}: smaller than {side} px, left out: {shown(few)}")
        reasons = {key: list(names) for key, names in missing.items()}
        notes += left_out(eval_set.name, reasons, len(eval_set.pairs) - len(few))
        for (scheme, target), (ours, theirs) in seen.items():
            row = Row(eval_set.name, factors[target], scheme)
            set_values[row] = {FD_VGG.key: frechet_distance(torch.cat(ours), torch.cat(theirs))}
        usage += _usage(eval_set.name, counts, model)
    shown_columns: tuple[Cells, ...] = (*columns, FD_VGG) if fd_vgg else tuple(columns)
    tables = {"usage": [{**use._asdict(), "usage": use.used / use.codes} for use in usage]}
    report = Report(tuple(scores), tuple(notes), columns=shown_columns, set_values=set_values, tables=tables)
    return TokenizerReport(report, tuple(usage))


def _small(eval_set: EvalSet, side: int) -> list[str]:
    """Names of the images with a shorter side than that, which must not be all."""
    found = []
    for pair in eval_set.pairs:
        if pair.hr is None:
            raise EvaluationError(f"{eval_set.name}: has no HR images to tokenize")
        if side_of(pair.hr) < side:
            found.append(pair.name)
    if len(found) == len(eval_set.pairs):
        raise EvaluationError(f"{eval_set.name}: no image has sides of {side} px")
    return found


def _plain(model: HitVar, levels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of each target, tokens of its image by itself, and what they decode to."""
    tokenizer, config = model.tokenizer, model.config.tokenizer
    found = []
    for target, level in enumerate(levels):
        steps, scales = config.pyramid.steps[target], config.pyramid.scales
        bank = tokenizer.quantize.bank(target)
        out = bank.quantize(tokenizer.encode(level), scales[:steps])
        found.append((out.indices, tokenizer.decode(out.reconstruction, target, _lr(model, levels, target))))
    return found


def _hierarchical(model: HitVar, image: Tensor, levels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of each target, its tokens by Algorithm 1, and what they decode to."""
    tokenizer, pyramid = model.tokenizer, model.config.tokenizer.pyramid
    out = tokenizer.tokenize(image)
    return [
        (
            out.indices[:, : pyramid.ends[steps - 1]],
            tokenizer.decode(latent, target, _lr(model, levels, target)),
        )
        for target, (steps, latent) in enumerate(zip(pyramid.steps, out.reconstructions, strict=True))
    ]


def _lr(model: HitVar, levels: Sequence[Tensor], target: int) -> Tensor | None:
    """The low-resolution image as the decoder of a target sees it."""
    return model.lr_image(levels[0], target) if model.config.tokenizer.decoder_lr else None


def _count(
    counts: dict[tuple[str, int], Tensor], key: tuple[str, int], indices: Tensor, codes: int, ends: Any
) -> None:
    steps = list(ends).index(indices.shape[1]) + 1
    counts.setdefault(key, torch.zeros(steps, codes, dtype=torch.int64))
    for step in range(steps):
        begin = ends[step - 1] if step else 0
        counts[key][step] += torch.bincount(indices[:, begin : ends[step]].flatten().cpu(), minlength=codes)


def _usage(name: str, counts: dict[tuple[str, int], Tensor], model: HitVar) -> list[CodeUse]:
    config, rows = model.config.tokenizer, list[CodeUse]()
    for (scheme, target), hits in counts.items():
        for step, scale_hits in enumerate(hits):
            share = scale_hits[scale_hits > 0].double() / scale_hits.sum()
            perplexity = math.exp(-float((share * share.log()).sum()))
            tokens, used = int(scale_hits.sum()), int((scale_hits > 0).sum())
            factor, side = config.scale_factors[target], config.scales[step]
            rows.append(CodeUse(name, scheme, factor, side, tokens, used, config.codebook_size, perplexity))
    return rows
