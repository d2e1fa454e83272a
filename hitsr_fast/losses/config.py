"""Weights of the training losses; without torch, so that the command line can list them quickly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from hitsr_fast.configs import Config, Count, Range, Share


@dataclass(frozen=True)
class ReconstructionLossConfig(Config):
    """Weights of the terms.

    HIT-VAR's own decoder loss is L2 + 5 LPIPS (section 4.1, backbone unstated): `pixel="l2"`, `vgg=5`,
    `alex=0`, `vgg_share=1`. The defaults are what a CPU affords: VGG on a few crops, the twenty times cheaper
    AlexNet on all.

    Args:
        pixel: Mean absolute (`"l1"`) or squared (`"l2"`) difference, images in [-1, 1], weight 1.
        alex: Weight of LPIPS-AlexNet.
        vgg: Weight of LPIPS-VGG.
        vgg_share: Share of the batch that LPIPS-VGG sees.
        crop: Largest side in pixels of the crop that LPIPS-VGG sees.
        jitter: LPIPS-AlexNet sees a random crop this many pixels smaller than the image, so that its stride-4
            grid never falls on the same pixels and leaves no pattern of its own.
    """

    pixel: Literal["l1", "l2"] = "l1"
    alex: Annotated[float, Range(0)] = 0.3
    vgg: Annotated[float, Range(0)] = 0.3
    vgg_share: Share = 0.25
    crop: Count = 64
    jitter: Annotated[int, Range(0)] = 8
