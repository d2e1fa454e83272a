"""How far a decoded image is from its target: pixel distance plus perceptual distances on random crops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.metrics.lpips import LPIPS


@dataclass(frozen=True)
class ReconstructionLossConfig:
    """Weights of the terms.

    HIT-VAR's own decoder loss is L2 + 5 LPIPS (section 4.1, backbone unstated): `pixel="l2"`, `vgg=5`, `alex=0`,
    `vgg_share=1`. The defaults are what a CPU affords: VGG on a few crops, the twenty times cheaper AlexNet on all.

    Args:
        pixel: Mean absolute (`"l1"`) or squared (`"l2"`) difference, images in [-1, 1], weight 1.
        alex: Weight of LPIPS-AlexNet.
        vgg: Weight of LPIPS-VGG.
        vgg_share: Share of the batch that LPIPS-VGG sees.
        crop: Largest side in pixels of the crop that LPIPS-VGG sees.
        jitter: LPIPS-AlexNet sees a random crop this many pixels smaller than the image, so that its stride-4 grid
            never falls on the same pixels and leaves no pattern of its own.
    """

    pixel: Literal["l1", "l2"] = "l1"
    alex: float = 0.3
    vgg: float = 0.3
    vgg_share: float = 0.25
    crop: int = 64
    jitter: int = 8


class ReconstructionLoss(nn.Module):
    """Callable `(output, target, generator) -> scalar` on `(B, 3, H, W)` images in [-1, 1]."""

    def __init__(self, config: ReconstructionLossConfig) -> None:
        super().__init__()
        self.config = config
        self.vgg = LPIPS("vgg").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.alex = LPIPS("alex").to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Loss averaged over the batch; crops are drawn from `generator` (on the CPU)."""
        config, side = self.config, target.shape[-1]
        distance = F.l1_loss if config.pixel == "l1" else F.mse_loss
        total = distance(output.float(), target.float())
        if config.alex > 0:
            smaller = max(side - config.jitter, 31)
            total = total + config.alex * self.alex(*shared_crop(output, target, smaller, generator)).mean()
        seen = round(config.vgg_share * len(target))
        if config.vgg > 0 and seen > 0:
            chosen = torch.randperm(len(target), generator=generator)[:seen]
            a, b = shared_crop(output[chosen], target[chosen], config.crop, generator)
            total = total + config.vgg * self.vgg(a, b).mean()
        return total


def shared_crop(a: Tensor, b: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same random square of both `(B, 3, H, W)` batches; whole images where they are no larger."""
    height, width = a.shape[-2:]
    y = int(torch.randint(max(height - side, 0) + 1, (), generator=generator))
    x = int(torch.randint(max(width - side, 0) + 1, (), generator=generator))
    return a[..., y : y + side, x : x + side], b[..., y : y + side, x : x + side]
