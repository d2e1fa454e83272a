"""Low-resolution training inputs from photos: ours, and image after image in plain PyTorch and Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks._harness import Benchmark, Call, Case, Inputs, Provider, package_version
from benchmarks.peers import degradation as plain
from hitsr_fast._version import __version__
from hitsr_fast.data import degradation
from hitsr_fast.data.degradation_config import PRESETS

_PHOTO = Path(__file__).parents[1] / "examples" / "budgie-osprey.jpg"
_SCALE, _SEED = 4, 0
# Levels of 8 bits by which an image may differ in the mean: a step of one JPEG moves the next, and the tables
# of the plain path are rounded, those of a float quality are not.
_ALLOWED, _ALLOWED_FLOAT = 5.0, 8.0


@dataclass(frozen=True)
class DegradationCase(Case):
    """`B` photos of `side` pixels to a quarter of it.

    Attributes:
        preset: strengths and probabilities.
        B: photos.
        side: of a photo.
    """

    preset: str
    B: int
    side: int

    @property
    def items(self) -> int:
        return self.B

    @property
    def flops(self) -> int:
        return 0

    def inputs(self, device: torch.device) -> Inputs:
        """Crops of an enlarged photo with grain."""
        generator = torch.Generator().manual_seed(0)
        with Image.open(_PHOTO) as photo:
            pixels = torch.from_numpy(np.array(photo.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        height, width = (side + 8 * self.B for side in (self.side, self.side * 3 // 2))
        large = F.interpolate(pixels, (height, width), mode="bicubic")
        large = (large + 0.02 * torch.randn(large.shape, generator=generator)).clamp(0, 1)
        starts = [8 * i for i in range(self.B)]
        crops = [large[..., at : at + self.side, at : at + self.side] for at in starts]
        return (torch.cat(crops).to(device),)

    def plans(self) -> list[Any]:
        """All that is random, of each photo: what `degrade` draws on the CPU before it computes."""
        sizes = (self.side, self.side), (self.side // _SCALE, self.side // _SCALE)
        streams = (np.random.default_rng((_SEED, i, 0)) for i in range(self.B))
        return [degradation._plan(*sizes, PRESETS[self.preset], rng) for rng in streams]

    def expected(self, *inputs: Tensor) -> Tensor:
        return plain.degrade(inputs[0].cpu(), self.plans(), PRESETS[self.preset]).to(inputs[0].device)

    def wrong_rows(self, result: Tensor | None, expected: Tensor) -> int:
        """Photos that are off by more than 5 levels in the mean; 8 where qualities are no whole numbers."""
        if result is None:
            return 0
        allowed = _ALLOWED_FLOAT if PRESETS[self.preset].float_quality else _ALLOWED
        return int(((result - expected).abs().mean((1, 2, 3)) * 255 > allowed).sum())


def _plain_call(case: DegradationCase, inputs: Inputs) -> Call:
    return lambda: plain.degrade(inputs[0], case.plans(), PRESETS[case.preset])


def _our_call(case: DegradationCase, inputs: Inputs) -> Call:
    return lambda: degradation.degrade(inputs[0], _SEED, config=PRESETS[case.preset])


def _draws(case: DegradationCase, inputs: Inputs) -> Call:
    def call() -> None:
        case.plans()

    return call


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: a line for each case, with the median milliseconds of each provider."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lines = [["preset", "photos", "side", *(f"`{name}`, ms" for name in names)]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for case in dict.fromkeys((row["preset"], row["B"], row["side"]) for row in rows):
        own = {row["provider"]: row for row in rows if (row["preset"], row["B"], row["side"]) == case}
        times = (own[name]["median_ms"] if name in own else "" for name in names)
        lines.append([f"`{case[0]}`", *case[1:], *(f"{float(time):,.0f}" if time else "" for time in times)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


BENCHMARK = Benchmark(
    op="degradation",
    providers=(
        Provider(
            "pillow",
            _plain_call,
            lambda case, inputs: "works on the CPU" if inputs[0].is_cuda else None,
            package_version("pillow"),
        ),
        Provider("ours", _our_call, version=lambda: __version__, ours=True),
        # Of a limit of its own: it is no quicker way to the same.
        Provider("ours:draws", _draws, version=lambda: __version__, ours=True, limit="draws"),
    ),
    cases=(
        *(DegradationCase(preset, 16, 128) for preset in ("real-esrgan", "x4plus", "varsr")),
        DegradationCase("x4plus", 16, 512),
    ),
    quick=(DegradationCase("x4plus", 2, 128), DegradationCase("real-esrgan", 1, 128)),
    repeats=5,
    summary=table,
)
