"""One table of systems: a photo of 128 pixels to 512 by every model that is here, and by Real-ESRGAN x4plus.

A system is a line of `SYSTEMS` and one of the cases.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks import _machine
from benchmarks._harness import Benchmark, Call, Case, Inputs, Provider, package_version
from benchmarks._macs import layer_macs, step_macs
from benchmarks.peers import real_esrgan
from benchmarks.shapes import MODELS
from hitsr_fast._version import __version__
from hitsr_fast.imaging.tiles import TilePlan
from hitsr_fast.models import HitVar
from hitsr_fast.models.hit_var.config import PRESETS
from hitsr_fast.pipeline import HitSR, pick_dtype

_PHOTO = Path(__file__).parents[1] / "examples" / "budgie-osprey.jpg"
_FACTOR = 4
_FAR = 0.1  # a trained model's image is nearer to the bicubic one, in the mean


@dataclass(frozen=True)
class System:
    """One model.

    Attributes:
        build: of a photo `(1, 3, S, S)` in [0, 1], the call that makes the large one of it.
        macs: of its side, the multiply-adds of each part, in their order.
        parameters: that the weights have.
        dtype: of a device, what is multiplied in.
        version: of what runs it.
        missing: what is not installed, with the command that installs it, or None.
        trained: whether the weights are; others are random.
        ours: one of this package's models.
    """

    build: Callable[[Tensor], Callable[[], Tensor]]
    macs: Callable[[int], Mapping[str, int]]
    parameters: Callable[[], int]
    dtype: Callable[[torch.device], str]
    version: Callable[[], str] = lambda: __version__
    missing: Callable[[], str | None] = lambda: None
    trained: bool = True
    ours: bool = True


def hit_var(preset: str) -> System:
    """HIT-VAR by `HitSR`, as `hitsr-fast upscale` runs it: tiles and colour fix included, x4 alone."""
    trained = preset == "hit-tiny"

    def build(photo: Tensor) -> Callable[[], Tensor]:
        if trained:
            sr = HitSR.from_pretrained(preset, photo.device)
        else:
            torch.manual_seed(0)
            model = HitVar(PRESETS[preset]).to(photo.device).eval()
            sr = HitSR(model.for_inference(pick_dtype(photo.device)), photo.device)
        return lambda: sr.upscale(photo, scales=(_FACTOR,), input="photo")[_FACTOR]

    @functools.cache
    def macs(side: int) -> dict[str, int]:
        config, shape = PRESETS[preset], MODELS[preset]
        tokenizer = config.tokenizer
        tiles = TilePlan.cover(side, side, config.lr_tile, config.lr_tile // 4).num_tiles
        with torch.device("meta"):
            model = HitVar(config)
            full, size = tokenizer.image_size, tokenizer.latent_size
            image, latent = torch.empty(1, 3, full, full), torch.empty(1, tokenizer.code_dim, size, size)
        last = len(tokenizer.targets) - 1
        parts = {"encoder": layer_macs(model.tokenizer, lambda: model.tokenizer.encode(image))}
        for step, scale in enumerate(shape.scales):
            name = f"prefix and {scale}²" if step == 0 else f"{scale}²"
            parts[name] = step_macs(shape, step, injected=config.transformer.prefix_injection)
        # Codes are upsampled and convolved on the map of each target, those of the steps before it again.
        phi = 9 * tokenizer.code_dim**2
        grids = zip(tokenizer.pyramid.steps, tokenizer.target_sizes, strict=True)
        parts["phi"] = sum(steps * phi * side**2 for steps, side in grids)
        parts["decoder"] = layer_macs(model.tokenizer, lambda: model.tokenizer.decode(latent, last, image))
        return {part: count * tiles for part, count in parts.items()}

    def parameters() -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in HitVar(PRESETS[preset]).parameters())

    def dtype(device: torch.device) -> str:
        return str(pick_dtype(device)).removeprefix("torch.")

    return System(build, macs, parameters, dtype, trained=trained)


def real_esrgan_x4plus() -> System:
    """By ncnn, the whole photo at once, with weights in fp16."""

    def build(photo: Tensor) -> Callable[[], Tensor]:
        upscale = real_esrgan.upscaler(torch.get_num_threads())
        return lambda: upscale(photo[0])[None]

    def macs(side: int) -> dict[str, int]:
        parts: dict[str, int] = {}
        for layer in real_esrgan.layers():
            parts[layer.part] = parts.get(layer.part, 0) + layer.macs(side)
        return parts

    return System(
        build,
        macs,
        lambda: sum(layer.parameters for layer in real_esrgan.layers()),
        lambda device: "float16",
        package_version("ncnn"),
        real_esrgan.missing,
        ours=False,
    )


SYSTEMS: Mapping[str, System] = {
    "hit-tiny": hit_var("hit-tiny"),
    "hit-d16": hit_var("hit-d16"),
    "real-esrgan-x4plus": real_esrgan_x4plus(),
}


@dataclass(frozen=True)
class SystemCase(Case):
    """A photo through a system.

    Attributes:
        system: name.
        side: of the photo; the result has four times as many pixels a side.
    """

    system: str
    side: int

    @property
    def items(self) -> int:
        return 1

    @property
    def flops(self) -> int:
        return 2 * sum(SYSTEMS[self.system].macs(self.side).values())

    def inputs(self, device: torch.device) -> Inputs:
        with Image.open(_PHOTO) as photo:
            pixels = torch.from_numpy(np.array(photo.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        size = (self.side, self.side)
        return (F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1).to(device),)

    def expected(self, *inputs: Tensor) -> Tensor:
        """Bicubic, which every trained system is near."""
        return F.interpolate(inputs[0], scale_factor=float(_FACTOR), mode="bicubic").clamp(0, 1)

    def wrong_rows(self, result: Tensor, expected: Tensor) -> int:
        if result.shape != expected.shape or not bool(result.isfinite().all()):
            return 1
        return int(SYSTEMS[self.system].trained and bool((result - expected).abs().mean() > _FAR))

    def figures(self, device: torch.device, threads: int, measured: bool) -> Mapping[str, object]:
        """What it computes and takes in all; `peak_mib` is that of a process of its own, with weights."""
        system = SYSTEMS[self.system]
        parts = system.macs(self.side)
        peak = None
        if measured:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak = pool.apply(_peak_bytes, (self, str(device), threads))
        return {
            "dtype": system.dtype(device),
            "weights": "trained" if system.trained else "random",
            "parameters": system.parameters(),
            "macs": sum(parts.values()),
            "macs_of": " + ".join(f"{part} {count}" for part, count in parts.items()),
            "peak_mib": peak / 2**20 if peak is not None else None,
        }


def _peak_bytes(case: SystemCase, device: str, threads: int) -> int | None:
    """Most memory that loading a system and a photo through it take, beyond a process that did neither."""
    torch.set_num_threads(threads)
    inputs = case.inputs(torch.device(device))
    return _machine.peak_extra_bytes(lambda: _call(case, inputs)(), torch.device(device))


def _call(case: SystemCase, inputs: Inputs) -> Call:
    call = SYSTEMS[case.system].build(inputs[0])

    def run() -> Tensor:
        with torch.no_grad():
            return call()

    return run


def _unavailable(case: SystemCase, inputs: Inputs) -> str | None:
    system = SYSTEMS[case.system]
    if inputs[0].is_cuda and not system.ours:
        return "is run on the CPU"
    return system.missing()


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: a line for each row, and under it the sums of their multiply-adds."""
    head = ["system", "weights", "dtype", "parameters", "GMAC", "seconds", "peak MiB"]
    lines = [head, ["---", "---", "---", *["---:"] * 4]]
    for row in rows:
        if row["median_ms"]:
            measured = [f"{float(row['median_ms']) / 1e3:.3g}", _rounded(row["peak_mib"])]
        else:
            measured = [row["reason"], ""]
        name, giga = _named(row["system"], int(row["side"])), int(row["macs"]) / 1e9
        parameters = f"{int(row['parameters']) / 1e6:.1f} M"
        lines.append([name, row["weights"], row["dtype"], parameters, f"{giga:,.0f}", *measured])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{text}\n{sums([(row['system'], int(row['side'])) for row in rows])}"


def sums(cases: Iterable[tuple[str, int]]) -> str:
    """Markdown: the parts that the GMAC of systems, for photos of a side, are the sums of."""
    text = ""
    for name, side in cases:
        parts = SYSTEMS[name].macs(side)
        listed = " + ".join(f"{part} {count / 1e9:.3g}" for part, count in parts.items())
        text += f"- {_named(name, side)}: {listed} = {sum(parts.values()) / 1e9:,.1f} GMAC\n"
    return text


def _named(system: str, side: int) -> str:
    return f"`{system}`, {side} to {_FACTOR * side}"


def _rounded(number: str) -> str:
    return f"{float(number):.0f}" if number else ""


BENCHMARK = Benchmark(
    op="systems",
    providers=(Provider("system", _call, _unavailable, ours=True),),
    cases=tuple(SystemCase(name, 128) for name in SYSTEMS),
    quick=(SystemCase("hit-tiny", 32), SystemCase("real-esrgan-x4plus", 16)),
    repeats=3,
    summary=table,
)

if __name__ == "__main__":
    print(sums((case.system, case.side) for case in BENCHMARK.cases), end="")
