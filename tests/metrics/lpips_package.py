"""A stand-in for the LPIPS source package: the real structure with random weights."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hitsr_fast.metrics.lpips_weights import SOURCE
from hitsr_fast.metrics.weights import WeightsSource

# (kernel side, channels in, channels out) of each convolution.
ALEX = [(11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256)]
VGG = [
    *[(3, 3, 64), (3, 64, 64), (3, 64, 128), (3, 128, 128), (3, 128, 256), (3, 256, 256), (3, 256, 256)],
    *[(3, 256, 512), (3, 512, 512), (3, 512, 512), (3, 512, 512), (3, 512, 512), (3, 512, 512)],
]
SCOPES = {"alex": "AlexNet_0", "vgg": "VGG16_0"}
HEADS = {"alex": [64, 192, 384, 256, 256], "vgg": [64, 128, 256, 512, 512]}


def random_tree(net: str, seed: int) -> dict[str, Any]:
    """Parameters as Flax stores them: kernels are (h, w, in, out)."""
    rng = np.random.default_rng(seed)
    scope: dict[str, Any] = {}
    for index, (side, inputs, outputs) in enumerate(ALEX if net == "alex" else VGG):
        kernel = rng.standard_normal((side, side, inputs, outputs), dtype=np.float32)
        kernel *= np.float32((2 / (side * side * inputs)) ** 0.5)
        bias = 0.1 * rng.standard_normal(outputs, dtype=np.float32)
        scope[f"Conv_{index}"] = {"kernel": kernel, "bias": bias}
    tree: dict[str, Any] = {SCOPES[net]: scope}
    for stage, width in enumerate(HEADS[net]):
        head = rng.random((1, 1, width, 1), dtype=np.float32)
        tree[f"NetLinLayer_{stage}"] = {"Conv_0": {"kernel": head}}
    return tree


def write_archive(path: Path, contents: dict[str, bytes]) -> WeightsSource:
    """Pack a source archive with these checkpoints; return the source that describes it."""
    with tarfile.open(path, "w:gz", compresslevel=0) as tar:
        for net, content in contents.items():
            info = tarfile.TarInfo(SOURCE.files[net].member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    files = {
        net: replace(SOURCE.files[net], sha256=hashlib.sha256(content).hexdigest())
        for net, content in contents.items()
    }
    archive_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return replace(SOURCE, sha256=archive_sha256, files=files)


class FakePackage(NamedTuple):
    """A packed stand-in, what it holds, and the weights that were made of it."""

    archive: Path
    source: WeightsSource
    trees: dict[str, dict[str, Any]]
    weights: Path
