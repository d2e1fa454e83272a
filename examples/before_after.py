"""Put a photo and its upscaled version side by side: `python examples/before_after.py PHOTO UPSCALED OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


def side_by_side(photo: Path, upscaled: Path) -> Image.Image:
    """The photo enlarged by bicubic interpolation on the left, the upscaled one on the right."""
    with Image.open(upscaled) as right, Image.open(photo) as left:
        after = right.convert("RGB")
        before = left.convert("RGB").resize(after.size, Image.Resampling.BICUBIC)
    gap = 8
    picture = Image.new("RGB", (2 * after.width + gap, after.height), "white")
    picture.paste(before, (0, 0))
    picture.paste(after, (after.width + gap, 0))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=22)
    for x, text in ((0, f"input, bicubic {after.width}x{after.height}"), (after.width + gap, "hit-tiny x4")):
        draw.text((x + 10, 8), text, "white", font, stroke_width=2, stroke_fill="black")
    return picture


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    side_by_side(Path(sys.argv[1]), Path(sys.argv[2])).save(sys.argv[3], optimize=True)
