"""How far a decoded image is from its target: pixel distance plus perceptual distances."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from hitsr_fast.losses.config import ReconstructionLossConfig
from hitsr_fast.metrics.lpips import LPIPS, LpipsNet

_SEEDS = 2**63  # they are below it


class Seeds(Protocol):
    """Where random numbers come from: for the samples of a batch, whole numbers from 0 to 2 ** 63 - 1."""

    def seeds(self, stream: str) -> list[int]:
        """One a sample; other numbers for each stream."""


def pixel_loss(output: Tensor, target: Tensor, kind: Literal["l1", "l2"]) -> Tensor:
    """Mean absolute (`"l1"`) or squared (`"l2"`) difference of each image.

    Args:
        output, target: Floating, `(B, 3, H, W)`.
        kind: Which of the two.

    Returns:
        `(B,)`, float32 or wider.

    Example:
        >>> pixel_loss(torch.full((1, 3, 2, 2), 0.5), torch.zeros(1, 3, 2, 2), "l2")
        tensor([0.2500])
    """
    difference = _wide(output) - _wide(target)
    distance = difference.abs() if kind == "l1" else difference.square()
    return distance.mean((1, 2, 3))


class ReconstructionLoss(nn.Module):
    """The weighted sum of pixel distance, LPIPS-AlexNet and LPIPS-VGG, of each image for itself.

    Calling it with output and target, `(B, 3, H, W)` in [-1, 1], and the draws of the samples gives `(B,)`.
    The gradient goes to the output.
    """

    def __init__(self, config: ReconstructionLossConfig) -> None:
        super().__init__()
        self.config = config
        self.vgg = _lpips("vgg", config.vgg)
        self.alex = _lpips("alex", config.alex)

    def forward(self, output: Tensor, target: Tensor, draw: Seeds) -> Tensor:
        """See the class; crops and choices of each target size are drawn by themselves."""
        config, side = self.config, target.shape[-1]
        total = pixel_loss(output, target, config.pixel)
        if self.alex is not None:
            smaller = max(side - config.jitter, 31)
            crops = crop_each(output, target, smaller, draw.seeds(f"alex/{side}"))
            total = total + config.alex * self.alex(*crops)
        if self.vgg is not None:
            seeds = draw.seeds(f"vgg/{side}")
            chosen = [row for row, seed in enumerate(seeds) if seed < config.vgg_share * _SEEDS]
            if chosen:
                places = draw.seeds(f"vgg_crop/{side}")
                seen = (take_rows(output, chosen), take_rows(target, chosen))
                crops = crop_each(*seen, config.crop or side, [places[row] for row in chosen])
                weight = config.vgg / config.vgg_share
                total = total + spread_rows(weight * self.vgg(*crops), chosen, len(seeds))
        return total


def over_targets(losses: Sequence[Tensor], config: ReconstructionLossConfig) -> Tensor:
    """Mean or sum over the targets of their images' losses, `(B,)` each."""
    stacked = torch.stack([*losses])
    return stacked.mean(0) if config.targets == "mean" else stacked.sum(0)


def take_rows(images: Tensor, rows: Iterable[int]) -> Tensor:
    """Some rows of `(B, ...)`; an index would wait for the device."""
    every = images.unbind()
    return torch.stack([every[row] for row in rows])


def spread_rows(values: Tensor, rows: Sequence[int], count: int) -> Tensor:
    """`values`, one a row of `rows`, in their places among `count`; 0 in the others."""
    known = dict(zip(rows, values.unbind(), strict=True))
    zero = torch.zeros_like(values[0])
    return torch.stack([known.get(row, zero) for row in range(count)])


def crop_each(a: Tensor, b: Tensor, side: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A random square of each image, the same of both `(B, 3, H, W)` batches.

    Whole images where they are no larger.
    """
    height, width = a.shape[-2:]
    rows, columns = max(height - side, 0) + 1, max(width - side, 0) + 1
    if rows == columns == 1:
        return a, b
    places = [(seed % rows, seed // rows % columns) for seed in seeds]

    def cropped(images: Tensor) -> Tensor:
        pairs = zip(images.unbind(), places, strict=True)
        return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in pairs])

    return cropped(a), cropped(b)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _lpips(net: LpipsNet, weight: float) -> LPIPS | None:
    """LPIPS on `net`, or None where it has no weight: then its parameters need not be there."""
    return LPIPS(net).to(memory_format=torch.channels_last) if weight > 0 else None
