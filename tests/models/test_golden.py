"""hit-tiny's picture of the sample photo is the one that was published with its weights.

The fingerprint is the mean colour of an 8 x 8 grid of cells of each output, without the colour fix, which
would bring most of it from the input. Another machine rounds differently, and a code may flip where two are
as good; a cell's mean hardly moves by that, and does by anything wrong with the model.
`python -m tests.models.test_golden` writes the fingerprint anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from hitsr_fast import HitSR
from hitsr_fast.imaging.io import picture_from_pil
from tests.tolerances import TOLERANCES

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden_hit_tiny.json")


def fingerprint() -> dict[str, list[list[float]]]:
    """Mean R, G, B in [0, 255] of each cell, row by row, for x1, x2 and x4."""
    with Image.open(ROOT / "examples/budgie-osprey.jpg") as photo:
        pixels = torch.from_numpy(picture_from_pil(photo).pixels).permute(2, 0, 1)[None].float() / 255
    outputs = HitSR.from_pretrained("hit-tiny", device="cpu", dtype=torch.float32).upscale(
        pixels[..., 32:96, 64:128], colour_fix=False
    )
    cells = {}
    for factor, image in ((1, outputs.x1), (2, outputs.x2), (4, outputs.x4)):
        assert image is not None and image.shape == (1, 3, 64 * factor, 64 * factor)
        means = F.adaptive_avg_pool2d(image, 8)[0].flatten(1).T * 255
        cells[f"x{factor}"] = [[round(value, 2) for value in cell] for cell in means.tolist()]
    return cells


def test_sample_photo_looks_as_published() -> None:
    golden = json.loads(GOLDEN.read_text())
    found = fingerprint()
    assert found.keys() == golden.keys()
    for factor, cells in golden.items():
        actual, expected = torch.tensor(found[factor]), torch.tensor(cells)
        torch.testing.assert_close(actual, expected, **TOLERANCES["golden_cells"]._asdict())


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(fingerprint(), indent=0) + "\n")
