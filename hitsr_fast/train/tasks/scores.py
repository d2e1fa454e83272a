"""Running scores of images, left on the device until they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hitsr_fast.metrics import psnr_y
from hitsr_fast.metrics.lpips import MIN_SIDE, lpips
from hitsr_fast.metrics.lpips_weights import weights_path

_BORDER = 4  # pixels that PSNR leaves out at each side, the field's habit at x4


class ImageScore:
    """Running means of PSNR-Y, and of LPIPS-alex where its weights are there, on images in [-1, 1].

    Images that are too small for a metric have none.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._has_lpips = weights_path().is_file()

    def add(self, output: Tensor, target: Tensor) -> None:
        """Some images `(B, 3, H, W)` and what they should be."""
        output, side = output.float().clamp(-1, 1), min(output.shape[-2:])
        if side > 2 * _BORDER:
            self._append("psnr_y", psnr_y((output + 1) / 2, (target + 1) / 2, border=_BORDER))
        if self._has_lpips and side >= MIN_SIDE["alex"]:
            self._append("lpips_alex", lpips(output, target))

    def means(self, prefix: str) -> dict[str, float]:
        """Of all images so far; empty if there were none."""
        return {f"{prefix}_{name}": torch.cat(v).mean().item() for name, v in self._values.items()}

    def _append(self, name: str, values: Tensor) -> None:
        self._values.setdefault(name, []).append(values)


class PyramidScore:
    """`ImageScore` of what is decoded at each target, by the sides of the targets' images."""

    def __init__(self, sides: Sequence[int]) -> None:
        self._scores = {side: ImageScore() for side in sides}

    def add(self, outputs: Sequence[Tensor], levels: Sequence[Tensor]) -> None:
        """The output of each target, and the images at its size."""
        for score, output, level in zip(self._scores.values(), outputs, levels, strict=True):
            score.add(output, level)

    def means(self) -> dict[str, float]:
        """`held_out_SIDE_NAME`."""
        found: dict[str, float] = {}
        for side, score in self._scores.items():
            found |= score.means(f"held_out_{side}")
        return found
