"""Batches of (HR, up-sampled LR, class) as a pure function of the step number."""

from __future__ import annotations

import torch
from torch import Tensor

from hitsr_fast.data.degradation import lr_pair
from hitsr_fast.data.folder import PhotoFolder
from hitsr_fast.nn.autoencoder import resize


class PairBatches:
    """Callable `(step, size) -> (hr, upsampled, class_id)`.

    `hr` is `(size, 3, S, S)` in [-1, 1]; `upsampled` its degraded (class 0) or clean (class 1) quarter-size
    version, 8-bit, bilinearly brought back to `S`; `class_id` `(size,)` int64. The same step gives the same
    batch.

    `seed` is that of the degradations, which run on `device`; `clean_prob` the share of clean bilinear pairs
    (HIT-VAR, section 4.1: at most 0.25).
    """

    def __init__(
        self,
        photos: PhotoFolder,
        *,
        seed: int = 0,
        clean_prob: float = 0.25,
        device: torch.device | str = "cpu",
    ) -> None:
        self.photos, self.seed, self.clean_prob, self.device = photos, seed, clean_prob, device

    def __call__(self, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        hr, lr, class_id = self.pairs(step, size)
        return hr, upsample_lr(lr, hr.shape[-1]), class_id

    def pairs(self, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same batch with the LR images `(size, 3, S / 4, S / 4)` as they are."""
        hr = self._crops(step, size)
        lr, class_id = lr_pair(hr, self.seed, first_index=step * size, clean_prob=self.clean_prob)
        return hr * 2 - 1, lr * 2 - 1, class_id

    def hr(self, step: int, size: int) -> Tensor:
        """The `hr` of a batch alone; nothing is degraded."""
        return self._crops(step, size) * 2 - 1

    def _crops(self, step: int, size: int) -> Tensor:
        return self.photos.batch(step * size, size).to(self.device)


def upsample_lr(lr: Tensor, side: int) -> Tensor:
    """Bring LR `(B, 3, h, w)` to the encoder's side: bilinear, as HIT-VAR conditions on (section 4.1)."""
    return resize(lr, (side, side), "bilinear")
