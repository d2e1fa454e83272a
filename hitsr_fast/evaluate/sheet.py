"""A sheet of pictures: the same cut-out of the input, of every result and of the ground truth, side by
side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hitsr_fast.evaluate.errors import EvaluationError
from hitsr_fast.evaluate.names import INPUT, TRUTH

_GAP: Final = 6
_LABEL: Final = 16


class Sheet:
    """Collects cut-outs as an evaluation goes and draws them: a row an image, a column a method.

    Args:
        path: `.png` file to draw.
        images: how many images of each set are shown, the first ones.
        side: of a cut-out in pixels of the largest scale; smaller images are shown whole.

    Raises:
        EvaluationError: another suffix, or no images.
    """

    def __init__(self, path: Path, *, images: int = 8, side: int = 192) -> None:
        if path.suffix != ".png":
            raise EvaluationError(f"{path}: expected a name that ends in .png")
        if images < 1:
            raise EvaluationError(f"sheet images: expected at least 1, found {images}")
        self.path, self.images, self.side = path, images, side
        self._rows: dict[str, dict[str, Image.Image]] = {}

    def add(self, row: str, column: str, image: Tensor, size: tuple[int, int]) -> None:
        """Show the centre of an image.

        Args:
            row: name of the image.
            column: what the picture is.
            image: `(1, 3, H, W)` in [0, 1].
            size: (height, width) that the image has at the largest scale; it is brought there by repeated
                pixels.
        """
        pixels = (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        whole = Image.fromarray(np.ascontiguousarray(pixels))
        if (whole.height, whole.width) != size:
            whole = whole.resize((size[1], size[0]), Image.Resampling.NEAREST)
        height, width = (min(self.side, side) for side in size)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        self._rows.setdefault(row, {})[column] = whole.crop((left, top, left + width, top + height))

    def save(self) -> None:
        """Draw the sheet; whole or not at all."""
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        for first, place in ((INPUT, 0), (TRUTH, len(columns))):
            if first in columns:
                columns.remove(first)
                columns.insert(place, first)
        side, step = self.side, self.side + _GAP
        width = max(len(columns), 1) * step + _GAP
        height = _LABEL + _GAP + len(self._rows) * (step + _LABEL)
        sheet = Image.new("RGB", (width, height), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
        for x, name in enumerate(columns):
            draw.text((_GAP + x * step, _GAP // 2), _fitting(name, side), fill="black", font=font)
        for y, (row, pictures) in enumerate(self._rows.items()):
            top = _LABEL + _GAP + y * (step + _LABEL)
            draw.text((_GAP, top), _fitting(row, width), fill="black", font=font)
            for name, picture in pictures.items():
                sheet.paste(picture, (_GAP + columns.index(name) * step, top + _LABEL))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            sheet.save(temporary, format="PNG")
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)


def _fitting(text: str, width: int) -> str:
    """What of a label fits, at about 6 px a letter; the default font has Latin letters only."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    most = max(width // 6, 1)
    return text if len(text) <= most else text[: most - 1] + "~"
