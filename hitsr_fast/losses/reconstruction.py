"""How far a decoded image is from its target: pixel distance plus perceptual distances on random crops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.losses.config import ReconstructionLossConfig
from hitsr_fast.metrics.lpips import LPIPS, LpipsNet


class ReconstructionLoss(nn.Module):
    """Callable `(output, target, generator) -> scalar` on `(B, 3, H, W)` images in [-1, 1]."""

    def __init__(self, config: ReconstructionLossConfig) -> None:
        super().__init__()
        self.config = config
        self.vgg = _lpips("vgg", config.vgg)
        self.alex = _lpips("alex", config.alex)

    def forward(self, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        """Loss averaged over the batch; crops are drawn from `generator` (on the CPU)."""
        config, side = self.config, target.shape[-1]
        distance = F.l1_loss if config.pixel == "l1" else F.mse_loss
        total = distance(output.float(), target.float())
        if self.alex is not None:
            smaller = max(side - config.jitter, 31)
            total = total + config.alex * self.alex(*shared_crop(output, target, smaller, generator)).mean()
        seen = round(config.vgg_share * len(target))
        if self.vgg is not None and seen > 0:
            chosen = torch.randperm(len(target), generator=generator)[:seen]
            a, b = shared_crop(output[chosen], target[chosen], config.crop, generator)
            total = total + config.vgg * self.vgg(a, b).mean()
        return total


def _lpips(net: LpipsNet, weight: float) -> LPIPS | None:
    """LPIPS on `net`, or None where it has no weight: then its parameters need not be there."""
    return LPIPS(net).to(memory_format=torch.channels_last) if weight > 0 else None


def shared_crop(a: Tensor, b: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same random square of both `(B, 3, H, W)` batches; whole images where they are no larger."""
    height, width = a.shape[-2:]
    y = int(torch.randint(max(height - side, 0) + 1, (), generator=generator))
    x = int(torch.randint(max(width - side, 0) + 1, (), generator=generator))
    return a[..., y : y + side, x : x + side], b[..., y : y + side, x : x + side]
