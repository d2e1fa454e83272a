"""Low-resolution images and targets of training crops, made on the device."""

from __future__ import annotations

from torch import Tensor

from hitsr_fast.data.degradation import lr_pairs_of
from hitsr_fast.data.degradation_config import PRESETS
from hitsr_fast.data.sharpen import unsharp_mask
from hitsr_fast.train.config import DataConfig
from hitsr_fast.train.draw import Draw


def lr_pairs(hr: Tensor, draw: Draw, data: DataConfig) -> tuple[Tensor, Tensor]:
    """The low-resolution version of each crop, degraded or, for a share of `clean_prob`, clean.

    Args:
        hr: float32 `(B, 3, S, S)` in [-1, 1], S a multiple of 4; not sharpened.
        draw: Of the samples, which alone decides what happens to each.
        data: Share and strength.

    Returns:
        lr: float32 `(B, 3, S / 4, S / 4)` in [-1, 1], on the 8-bit grid.
        class_id: int64 `(B,)` on the device: 0 degraded, 1 clean.
    """
    keys = [(seed,) for seed in draw.seeds("degradation")]
    lr, class_id = lr_pairs_of(
        hr.add(1).div_(2), keys, clean_prob=data.clean_prob, config=PRESETS[data.degradation]
    )
    return lr.mul_(2).sub_(1), class_id


def targets(hr: Tensor, data: DataConfig) -> Tensor:
    """What is trained towards: the crops, float32 `(B, 3, S, S)` in [-1, 1], or their sharpened selves."""
    if not data.sharp_target:
        return hr
    return unsharp_mask(hr.add(1).div_(2)).mul_(2).sub_(1)
