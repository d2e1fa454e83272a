"""HIT-VAR from an LR image to the images it makes: ours, the plain path, and Real-ESRGAN for photos."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._harness import Benchmark, Call, Case, Inputs, Provider, package_version
from benchmarks.peers import real_esrgan
from benchmarks.shapes import MODELS
from hitsr_fast._version import __version__
from hitsr_fast.dispatch import use_backend
from hitsr_fast.models import HitUpscaler, HitVar
from hitsr_fast.models.base import INPUTS, Input
from hitsr_fast.models.hit_var.config import PRESETS
from hitsr_fast.nn.sampling import SamplingOptions
from hitsr_fast.pipeline import HitSR
from hitsr_fast.reference import hit_sampler as reference

_PHOTO = Path(__file__).parents[1] / "examples" / "budgie-osprey.jpg"
_MOST_NOISE = 10**-3.5  # 35 dB
_INPUT: Input = "photo"  # as in the published results
_CLASS = INPUTS.index(_INPUT)

Stage = Literal["tiles", "encode", "sample", "decode", "photo", "scale"]


@dataclass(frozen=True)
class GenerateCase(Case):
    """One part of the way, or all of it.

    Attributes:
        preset: of the model; hit-tiny has trained weights, others random ones.
        stage: "tiles": LR tiles to the images of all targets; "encode", "sample", "decode": its parts, the
            latter two up to and at target number `target`; "photo": a photo of `side` pixels to x1, x2 and x4
            by `HitSR`; "scale": blocks, classifier and choice of scale number `step`, prefix included in 0.
        B: tiles, or photos.
        target: number of the last target.
        side: of the photo.
        step: number of the scale.
    """

    preset: str
    stage: Stage
    B: int = 1
    target: int = 2
    side: int = 0
    step: int = 0

    @property
    def items(self) -> int:
        return self.B

    @property
    def flops(self) -> int:
        """Convolutions and products of the part; of a photo, of its tiles without their overlap."""
        config = PRESETS[self.preset]
        tokenizer, total = config.tokenizer, 0
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = HitVar(config).tokenizer
            size, stride = tokenizer.latent_size, tokenizer.stride
            if self.stage in ("tiles", "encode", "photo"):
                model.encode(torch.empty(self.B, 3, size * stride, size * stride))
            for target, side in enumerate(tokenizer.target_sizes):
                if self.stage in ("tiles", "photo") or (self.stage == "decode" and target == self.target):
                    seen = torch.empty(self.B, 3, side * stride, side * stride)
                    model.decode(torch.empty(self.B, tokenizer.code_dim, side, side), target, seen)
        if self.stage in ("tiles", "sample", "photo"):
            steps = tokenizer.pyramid.steps[self.target]
            total += self.B * sum(self._transformer_flops(step) for step in range(steps))
        elif self.stage == "scale":
            total += self.B * self._transformer_flops(self.step)
        tiles = (4 * self.side / tokenizer.image_size) ** 2 if self.stage == "photo" else 1
        return int((counter.get_total_flops() + total) * tiles)

    def _transformer_flops(self, step: int) -> int:
        """Blocks and classifier for one scale of one image, AdaLN and embeddings left out."""
        shape = MODELS[self.preset]
        width, (start, length) = shape.width, shape.step(step)
        classifier = 2 * width * shape.K * shape.lengths[step]
        return shape.depth * (24 * width**2 * length + 4 * width * length * (start + length)) + classifier

    def inputs(self, device: torch.device) -> Inputs:
        """LR tiles; for "sample" their features; for "decode" a latent and the tiles; or a photo.

        For "scale" tokens, and keys and values `(layers, B, NH, T, D)` of those before.
        """
        with Image.open(_PHOTO) as photo:
            pixels = torch.from_numpy(np.array(photo.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        if self.stage == "photo":
            image = F.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True)
            return (image.clamp(0, 1).expand(self.B, -1, -1, -1).to(device),)
        model = _model(self.preset, device)
        if self.stage == "scale":
            body, generator = MODELS[self.preset], torch.Generator().manual_seed(0)
            start, length = body.step(self.step)
            x = torch.randn(self.B, length, body.width, generator=generator)
            k, v = torch.randn(2, body.depth, self.B, body.heads, start, body.D, generator=generator)
            return x.to(device), F.normalize(k, dim=-1).to(device), v.to(device)
        tiles = F.interpolate(
            pixels, (model.config.lr_tile, model.config.lr_tile), mode="bicubic", antialias=True
        )
        tiles = (tiles.clamp(0, 1) * 2 - 1).expand(self.B, -1, -1, -1).to(device)
        if self.stage in ("tiles", "encode"):
            return (tiles,)
        with torch.no_grad():
            features = model.lr_features(tiles)
            if self.stage == "sample":
                return (features,)
            size = PRESETS[self.preset].tokenizer.target_sizes[self.target]
            return F.adaptive_avg_pool2d(features, size), tiles

    def expected(self, *inputs: Tensor) -> Any:
        return _plain(self, inputs)()

    def wrong_rows(self, result: Any, expected: Any) -> int:
        """Images or latents that are less than 35 dB from the plain path's, or not finite.

        A rounding decides where two codes are all but equally likely, and other tokens follow. So only shapes
        and finite values are asked of "sample", and of "tiles" with random weights; the tests compare tokens.
        The images of another model are not compared.
        """
        if isinstance(result, _OtherModel):
            return 0
        chaotic = self.stage == "sample" or (self.stage == "tiles" and self.preset != "hit-tiny")
        wrong = 0
        for found, exact in zip(result, expected, strict=True):
            if found.shape != exact.shape or not found.isfinite().all():
                wrong += self.B
            elif not chaotic:
                noise = (found.float() - exact.float()).square().flatten(1).mean(1)
                peak = exact.float().flatten(1).amax(1) - exact.float().flatten(1).amin(1)
                wrong += int((noise > _MOST_NOISE * peak.square()).sum())
        return wrong


@functools.lru_cache(maxsize=1)
def _model(preset: str, device: torch.device) -> HitVar:
    if preset == "hit-tiny":
        return HitVar.from_pretrained(preset, device=device, dtype=torch.float32)
    torch.manual_seed(0)
    return HitVar(PRESETS[preset]).to(device).eval()


class _PlainModel:
    """The plain path as `HitSR` asks for it."""

    def __init__(self, model: HitVar) -> None:
        self.model, config = model, model.config
        self.lr_tile, self.scale_factors = config.lr_tile, config.scale_factors
        self.num_scales = len(config.tokenizer.scales)
        self.colour_fix_levels = dict(zip(config.scale_factors, config.colour_fix_levels, strict=True))

    def super_resolve(self, lr: Tensor, *_sampling: Any, **_options: Any) -> dict[int, Tensor]:
        return reference.super_resolve(self.model, lr, _CLASS)


def _classes(features: Tensor) -> Tensor:
    return torch.full((len(features),), _CLASS, dtype=torch.int64, device=features.device)


def _images(upscaled: Any) -> Sequence[Tensor]:
    return tuple(upscaled.values())


def _plain(case: GenerateCase, inputs: Inputs) -> Call:
    model, stage, target = _model(case.preset, inputs[0].device), case.stage, case.target
    sr = HitSR(_PlainModel(model), inputs[0].device)  # type: ignore[arg-type]
    calls: dict[str, Callable[[], Any]] = {
        "tiles": lambda: tuple(reference.super_resolve(model, inputs[0], _CLASS).values()),
        "encode": lambda: (model.lr_features(inputs[0]),),
        "sample": lambda: reference.sample(model, inputs[0], _classes(inputs[0]), targets=target + 1)[1],
        "decode": lambda: (model.decode([inputs[0]] * 3, target, inputs[1]).clamp(-1, 1),),
        "scale": lambda: _plain_scale(model, case, inputs),
        "photo": lambda: _images(sr.upscale(inputs[0], input=_INPUT)),
    }

    def call() -> Any:
        with use_backend("reference"), torch.no_grad():
            return calls[stage]()

    return call


def _plain_scale(model: HitVar, case: GenerateCase, inputs: Inputs) -> Sequence[Tensor]:
    """Logits of one scale, and the choice that is made of them."""
    x, keys, values = inputs
    before = None if case.step == 0 else list(zip(keys, values, strict=True))
    caches: Any = before or [None] * len(keys)
    condition = model.transformer.class_emb(_classes(x))
    logits = reference.step_logits(model.transformer, x, condition, caches)
    logits = logits[:, -MODELS[case.preset].lengths[case.step] :]
    logits.argmax(dim=-1)
    return (logits,)


def _our_scale(upscaler: HitUpscaler, case: GenerateCase, inputs: Inputs) -> Call:
    """The same from a cache that holds the tokens before."""
    sampler, (x, keys, values) = upscaler.sampler, inputs
    start, length = MODELS[case.preset].step(case.step)
    cache = sampler.body.new_cache(len(x), start + length)
    cache.k[:, :, :start], cache.v[:, :, :start] = keys.transpose(2, 3), values.transpose(2, 3)
    plan = SamplingOptions().plan(1, 1)

    def call() -> Sequence[Tensor]:
        with torch.no_grad():
            stream = sampler.body(x, sampler.modulation[:, :, _classes(x)], cache, start)
            last = stream.last(len(x), sampler.pyramid.lengths[case.step])
            _, rows = last.normed(*sampler.head_modulation[:, _classes(x)].unbind())
            logits = sampler.classifier.logits(rows)
            plan.draw(logits.flatten(0, 1)[None], None, 0)
            return (logits,)

    return call


def _ours(dtype: torch.dtype, graphs: bool) -> Provider[GenerateCase]:
    def build(case: GenerateCase, inputs: Inputs) -> Call:
        device = inputs[0].device
        upscaler = HitUpscaler(_model(case.preset, device), dtype=dtype, cuda_graphs=graphs)
        sr = HitSR(upscaler, device)
        calls: dict[str, Call] = {
            "tiles": lambda: tuple(upscaler.super_resolve(inputs[0], input=_INPUT).values()),
            "encode": lambda: (upscaler.lr_features(inputs[0]),),
            "sample": lambda: upscaler.sampler.sample(
                inputs[0], _classes(inputs[0]), targets=case.target + 1
            )[1],
            "decode": lambda: (upscaler.decode(inputs[0], case.target, inputs[1]),),
            "photo": lambda: _images(sr.upscale(inputs[0], input=_INPUT)),
        }
        return _our_scale(upscaler, case, inputs) if case.stage == "scale" else calls[case.stage]

    def unavailable(case: GenerateCase, inputs: Inputs) -> str | None:
        return "CUDA graphs need a CUDA device" if graphs and not inputs[0].is_cuda else None

    name = str(dtype).removeprefix("torch.")
    return Provider(
        name=f"graph:{name}" if graphs else f"eager:{name}",
        build=build,
        unavailable=unavailable,
        version=lambda: __version__,
        ours=True,
    )


class _OtherModel(tuple[Tensor, ...]):
    """The images of a model that is not ours."""


def _esrgan_call(case: GenerateCase, inputs: Inputs) -> Call:
    """Its x4; it makes no x1 and x2."""
    upscale = real_esrgan.upscaler(torch.get_num_threads())
    return lambda: _OtherModel([upscale(inputs[0][0])])


def _esrgan_unavailable(case: GenerateCase, inputs: Inputs) -> str | None:
    if case.stage != "photo" or case.B != 1 or inputs[0].is_cuda:
        return "takes one photo, on the CPU"
    return real_esrgan.missing()


BENCHMARK = Benchmark(
    op="generate",
    providers=(
        Provider("reference", _plain, version=lambda: __version__),
        Provider("real-esrgan-x4plus:ncnn", _esrgan_call, _esrgan_unavailable, package_version("ncnn")),
        _ours(torch.float32, graphs=False),
        _ours(torch.bfloat16, graphs=False),
        _ours(torch.bfloat16, graphs=True),
    ),
    cases=(
        GenerateCase("hit-tiny", "photo", side=128),
        GenerateCase("hit-d16", "sample"),
        GenerateCase("hit-d16", "decode"),
        GenerateCase("hit-d16", "tiles"),
        *(GenerateCase("hit-d16", "scale", step=step) for step in range(10)),
    ),
    quick=(
        GenerateCase("hit-tiny", "photo", side=32),
        GenerateCase("hit-tiny", "encode"),
        GenerateCase("hit-tiny", "sample", target=1),
        GenerateCase("hit-tiny", "decode", target=0),
        GenerateCase("hit-tiny", "tiles"),
        GenerateCase("hit-tiny", "scale"),
        GenerateCase("hit-tiny", "scale", step=3),
    ),
)
