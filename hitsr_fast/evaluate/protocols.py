"""What is measured, and on which part of the images: the columns of a table, and named sets of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from torch import Tensor

from hitsr_fast.evaluate.errors import EvaluationError
from hitsr_fast.evaluate.sets import SCALES
from hitsr_fast.metrics.registry import METRICS, Metric

Channel = Literal["y", "rgb"]
Border = int | Literal["scale"]

# Metrics that exist on luma and on RGB: `--channel` says which.
_OF_A_CHANNEL: Final = ("psnr", "ssim")


@dataclass(frozen=True)
class Protocol:
    """A named set of defaults.

    Args:
        name: as `--protocol` takes it.
        channels: on which PSNR and SSIM are measured, each a column of its own.
        borders: pixels that PSNR and SSIM leave out on each side, each a column of its own; "scale" is as
            many as the scale.
        metrics: those that must be there; "psnr" and "ssim" are those of `channels`.
        where_possible: those that are measured where their packages and weights are there.
        colour_fix: whether models take the low frequencies from the input.
        center_crop: side in HR pixels of the part that is evaluated; None for whole images.
        scales: the factors that are scored; the ground truth of a smaller one is the HR image scaled down.
    """

    name: str
    channels: tuple[Channel, ...]
    borders: tuple[Border, ...]
    metrics: tuple[str, ...]
    where_possible: tuple[str, ...]
    colour_fix: bool
    center_crop: int | None
    scales: tuple[int, ...]


_BLIND: Final = ("niqe", "musiq", "maniqa", "clipiqa")

PROTOCOLS: Final[Mapping[str, Protocol]] = {
    protocol.name: protocol
    for protocol in (
        Protocol("own", ("y",), ("scale",), ("psnr", "ssim", "lpips"), (), True, None, SCALES),
        Protocol(
            "papers", ("y",), (0,), ("psnr", "ssim", "lpips"), ("dists", "fid", *_BLIND), False, 512, SCALES
        ),
        Protocol(
            "iqa",
            ("rgb",),
            (0,),
            ("psnr", "ssim", "lpips"),
            ("dists", "fid", *_BLIND),
            False,
            None,
            SCALES[-1:],
        ),
    )
}


@dataclass(frozen=True)
class Column:
    """One number of a table's row.

    Args:
        key: its name in CSV and JSON files.
        title: its name in tables.
        metric: what is measured.
        border: pixels left out on each side; "scale" is as many as the scale.
    """

    key: str
    title: str
    metric: Metric
    border: Border = 0

    def format(self, value: float) -> str:
        """A cell of the table; "-" where nothing was measured."""
        return "-" if math.isnan(value) else f"{value:.{self.metric.digits}f}"

    def measure(self, result: Tensor, truth: Tensor | None, scale: int) -> tuple[float, str | None]:
        """The number for one image, or NaN and, where that is worth a note, the reason.

        Args:
            result: `(1, 3, H, W)` in [0, 1].
            truth: of the same shape; None where there is none.
            scale: of the result.
        """
        if self.metric.kind == "full" and truth is None:
            return math.nan, None
        border = scale if self.border == "scale" else self.border
        needed = self.metric.min_side + 2 * border
        if min(result.shape[2:]) < needed:
            return math.nan, f"{self.title} needs sides of {needed} px"
        images = (result, truth) if self.metric.kind == "full" else (result,)
        value: Tensor = self.metric.measure(*images, border)
        return value.item(), None


def columns_of(
    metrics: Sequence[str], channels: Sequence[Channel] = ("y",), borders: Sequence[Border] = ("scale",)
) -> tuple[Column, ...]:
    """The columns that some metrics stand for.

    Args:
        metrics: names of `METRICS`; "psnr" and "ssim" stand for those of each channel.
        channels: of "psnr" and "ssim".
        borders: of the metrics that leave out a border by custom, PSNR and SSIM; each gives columns of its
            own. The others see the whole image.

    Raises:
        EvaluationError: an unknown metric, channel or border, or one given twice.
    """
    for name, given, known in (
        ("channel", channels, ("y", "rgb")),
        ("metrics", metrics, (*_OF_A_CHANNEL, *METRICS)),
    ):
        unknown = [value for value in given if value not in known]
        if unknown or not given or len(set(given)) < len(given):
            raise EvaluationError(
                f"{name}: expected some of {', '.join(known)}, each once, found {list(given)}"
            )
    fine = all(border == "scale" or (isinstance(border, int) and border >= 0) for border in borders)
    if not fine or not borders or len(set(borders)) < len(borders):
        raise EvaluationError(
            f"border: expected numbers of at least 0 or scale, each once, found {list(borders)}"
        )
    columns: dict[str, Column] = {}
    for border in borders:
        for name in metrics:
            for metric in [f"{name}_{channel}" for channel in channels] if name in _OF_A_CHANNEL else [name]:
                column = _column(METRICS[metric], border, many=len(borders) > 1)
                columns.setdefault(column.key, column)
    return tuple(columns.values())


def _column(metric: Metric, border: Border, *, many: bool) -> Column:
    if not metric.bordered:
        return Column(metric.name, metric.title, metric)
    if not many:
        return Column(metric.name, metric.title, metric, border)
    return Column(f"{metric.name}_border_{border}", f"{metric.title} border {border}", metric, border)


def parse_border(text: str) -> Border:
    """The border that `--border` names."""
    if text == "scale":
        return "scale"
    if not text.isascii() or not text.isdigit():
        raise EvaluationError(f"border: expected a number of pixels or scale, found {text!r}")
    return int(text)


def runnable(protocol: Protocol, *, saves: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The metrics of a protocol that can be measured here, and of the others, why not.

    Args:
        protocol: whose metrics.
        saves: whether the results are saved, so that metrics of whole sets have folders to look at.
    """
    found, notes = list(protocol.metrics), []
    for name in protocol.where_possible:
        reason = METRICS[name].missing() or (None if saves else _needs_folders(METRICS[name]))
        if reason is None:
            found.append(name)
        else:
            notes.append(f"{METRICS[name].title} left out: {reason}")
    return tuple(found), tuple(notes)


def require(columns: Sequence[Column], *, saves: bool) -> None:
    """Raise EvaluationError, before any work, for columns that cannot be measured here."""
    for column in columns:
        reason = column.metric.missing() or (None if saves else _needs_folders(column.metric))
        if reason is not None:
            raise EvaluationError(f"{column.metric.name}: {reason}")


def _needs_folders(metric: Metric) -> str | None:
    return "compares folders of results: give --save DIR" if metric.kind == "set" else None
