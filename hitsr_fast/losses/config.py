"""Weights of the training losses; without torch, so that the command line can list them quickly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hitsr_fast.configs import AnyCount, Config, Share, Weight


@dataclass(frozen=True)
class ReconstructionLossConfig(Config):
    """Weights of the terms.

    HIT-VAR's own decoder loss is L2 + 5 LPIPS on whole images (section 4.1, backbone unstated): `pixel="l2"`,
    `vgg=5`, `alex=0`, `vgg_share=1`, `crop=0`, `targets="sum"`. The defaults are what a CPU affords: VGG on
    crops of a few images, the twenty times cheaper AlexNet on all.

    Args:
        pixel: Mean absolute (`"l1"`) or squared (`"l2"`) difference, images in [-1, 1], weight 1.
        alex: Weight of LPIPS-AlexNet.
        vgg: Weight of LPIPS-VGG.
        vgg_share: Share of the images that LPIPS-VGG sees, drawn image by image; their term weighs as many
            times more as there are fewer of them.
        crop: Largest side in pixels of the crop that LPIPS-VGG sees; 0 shows it whole images.
        jitter: LPIPS-AlexNet sees a random crop this many pixels smaller than the image, so that its stride-4
            grid never falls on the same pixels and leaves no pattern of its own.
        targets: How the losses of an image's targets become one.
    """

    pixel: Literal["l1", "l2"] = "l1"
    alex: Weight = 0.3
    vgg: Weight = 0.3
    vgg_share: Share = 0.25
    crop: AnyCount = 64
    jitter: AnyCount = 8
    targets: Literal["mean", "sum"] = "mean"
