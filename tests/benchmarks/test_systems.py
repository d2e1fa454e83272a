"""Multiply-adds of the systems: counted layer by layer, and against PyTorch's own counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_systems
from benchmarks._macs import layer_macs, step_macs
from benchmarks.bench_systems import SYSTEMS
from benchmarks.peers import real_esrgan
from benchmarks.shapes import MODELS
from hitsr_fast.dispatch import use_backend
from hitsr_fast.models import HitVar
from hitsr_fast.models.hit_var.config import PRESETS
from hitsr_fast.reference import hit_sampler


@pytest.mark.parametrize("preset", ["hit-tiny", "hit-d16"])
def test_encoder_and_decoder_are_counted_as_pytorch_counts_them(preset: str) -> None:
    config = PRESETS[preset].tokenizer
    with torch.device("meta"):
        tokenizer = HitVar(PRESETS[preset]).tokenizer
        image = torch.empty(1, 3, config.image_size, config.image_size)
        latent = torch.empty(1, config.code_dim, config.latent_size, config.latent_size)
    for call in (lambda: tokenizer.encode(image), lambda: tokenizer.decode(latent, 2, image)):
        with FlopCounterMode(display=False) as counter:
            call()
        assert layer_macs(tokenizer, call) == counter.get_total_flops() / 2 > 0


def test_scales_are_counted_as_pytorch_counts_them() -> None:
    """The definition's products for a scale, with a cache of those before."""
    shape, config = MODELS["hit-tiny"], PRESETS["hit-tiny"]
    transformer = HitVar(config).transformer
    for step in (0, 4):
        start, rows = shape.step(step)
        given = torch.randn(1, rows, shape.width)
        keys = torch.randn(2, 1, shape.heads, start, shape.D)
        caches = [(keys[0], keys[1]) if start else None] * shape.depth
        condition = transformer.class_emb.weight[:1]
        with torch.no_grad(), use_backend("reference"), FlopCounterMode(display=False) as counter:
            hit_sampler.step_logits(transformer, given, condition, caches)  # type: ignore[arg-type]
        width, unused = shape.width, rows - shape.lengths[step]  # the definition classifies the prefix too
        modulation = (6 * shape.depth + 2) * width**2
        # The counter does not look into our op: two products for each pair of tokens, of each head.
        pairs = shape.depth * shape.heads * rows * (start + rows)
        expected = counter.get_total_flops() / 2 - modulation - width * shape.K * unused + 2 * shape.D * pairs
        embedded = shape.C * width * (shape.prefix if step == 0 else shape.lengths[step])
        assert step_macs(shape, step) - embedded == pytest.approx(expected, rel=1e-6)
        injected = step_macs(shape, step, injected=True) - step_macs(shape, step)
        assert injected == shape.C * width * shape.lengths[step]


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class DenseBlock(nn.Module):
    """ESRGAN's five convolutions, each of all maps before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(conv(64 + 32 * i, 32 if i < 4 else 64) for i in range(5))

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.layers:
            maps.append(F.leaky_relu(layer(torch.cat(maps, 1)), 0.2))
        return x + 0.2 * maps[-1]


class RealEsrgan(nn.Module):
    """The network of x4plus."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = conv(3, 64), nn.Sequential(*(DenseBlock() for _ in range(69)), conv(64, 64))
        self.up, self.last = (
            nn.ModuleList([conv(64, 64), conv(64, 64)]),
            nn.Sequential(conv(64, 64), conv(64, 3)),
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image)
        x = x + self.body(x)
        for layer in self.up:
            x = layer(F.interpolate(x, scale_factor=2.0))
        large: Tensor = self.last(x)
        return large


def test_real_esrgan_is_counted() -> None:
    """Of parameters it has 16,697,987: so many are in the file of weights that ncnn reads."""
    assert SYSTEMS["real-esrgan-x4plus"].parameters() == 16_697_987
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = RealEsrgan()
        assert network(torch.empty(1, 3, 16, 24)).shape == (1, 3, 64, 96)
    assert sum(parameter.numel() for parameter in network.parameters()) == 16_697_987
    assert sum(layer.macs(1) for layer in real_esrgan.layers()) * 16 * 24 == counter.get_total_flops() / 2


def test_tiles_are_counted() -> None:
    """A tile of hit-tiny is 32 pixels; 128 take 5 x 5 of them, which overlap by 8 or more."""
    one, all_of_128 = (SYSTEMS["hit-tiny"].macs(side) for side in (32, 128))
    assert all_of_128 == {part: 25 * count for part, count in one.items()}
    scales = MODELS["hit-tiny"].scales
    assert list(one) == [
        "encoder",
        f"prefix and {scales[0]}²",
        *(f"{scale}²" for scale in scales[1:]),
        "phi",
        "decoder",
    ]


def test_every_system_is_a_case() -> None:
    assert [case.system for case in bench_systems.BENCHMARK.cases] == list(SYSTEMS)


def test_the_docs_show_the_sums() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md").read_text()
    assert bench_systems.sums((case.system, case.side) for case in bench_systems.BENCHMARK.cases) in text
