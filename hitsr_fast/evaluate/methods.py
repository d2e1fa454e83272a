"""Methods to compare: what makes larger images from an LR image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from PIL import Image
from torch import Tensor

from hitsr_fast.evaluate.sets import to_tensor
from hitsr_fast.pipeline import HitSR, UpscaleOptions


class Method(Protocol):
    """Anything that makes larger images from an LR image: implement this to compare another peer."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        ...

    def upscale(self, lr: Tensor, scales: Sequence[int]) -> dict[int, Tensor]:
        """Restore an LR image at several scales.

        Args:
            lr: float32 `(1, 3, h, w)`, RGB in [0, 1], on the evaluation's device.
            scales: the factors wanted, out of `SCALES`.

        Returns:
            For each scale `s` a floating-point `(1, 3, s h, s w)`, RGB in [0, 1].
        """
        ...


class Bicubic:
    """Pillow's bicubic interpolation: the baseline of every table. Scale 1 is the LR image itself."""

    name = "bicubic"

    def upscale(self, lr: Tensor, scales: Sequence[int]) -> dict[int, Tensor]:
        """As `Method.upscale`."""
        image = Image.fromarray((lr[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy())
        size = {scale: (image.width * scale, image.height * scale) for scale in scales}
        resized = {scale: image.resize(size[scale], Image.Resampling.BICUBIC) for scale in scales}
        return {scale: to_tensor(result).to(lr.device) for scale, result in resized.items()}


class HitSRMethod:
    """A model as a method.

    Args:
        name: what the table calls it.
        model: the model.
        options: how to upscale; its `scales` are those of the evaluation.
    """

    def __init__(self, name: str, model: HitSR, options: UpscaleOptions | None = None) -> None:
        self.name, self._model, self._options = name, model, options or UpscaleOptions()

    def upscale(self, lr: Tensor, scales: Sequence[int]) -> dict[int, Tensor]:
        """As `Method.upscale`."""
        return self._model.upscale_tensor(lr, replace(self._options, scales=tuple(scales)))
