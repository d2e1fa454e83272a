"""Upscale a photo from Python: `python examples/upscale_photo.py [PHOTO]`."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from hitsr_fast import HitSR

photo = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("budgie-osprey.jpg")

sr = HitSR.from_pretrained("hit-tiny")
with Image.open(photo) as image:
    out = sr.upscale(image)

for factor, picture in out.items():
    target = Path(f"{photo.stem}_x{factor}.png")
    picture.save(target)
    print(target, "x".join(map(str, picture.size)))
