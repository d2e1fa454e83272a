"""LPIPS v0.1, the learned perceptual distance, in plain PyTorch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from hitsr_fast.checks import check_pair
from hitsr_fast.metrics.lpips_weights import load_weights, weights_path

LpipsNet = Literal["alex", "vgg"]

# Smallest image side for which the last feature map is not empty.
MIN_SIDE: dict[str, int] = {"alex": 31, "vgg": 16}

# ImageNet mean and standard deviation, carried from [0, 1] to [-1, 1] and rounded as LPIPS has them.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)

# Below this squared norm a feature vector counts as zero. It is the square of LPIPS's own 1e-10, so the
# value does not change; the gradient of the square root, infinite at zero, becomes finite.
_MIN_SQUARED_NORM = 1e-20


# Width, side, stride and padding of each convolution, by the stages at whose ends LPIPS compares.
VGG_STAGES = tuple([(w, 3, 1, 1)] * depth for w, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)))
_CONVS = {
    "alex": ([(64, 11, 4, 2)], [(192, 5, 1, 2)], [(384, 3, 1, 1)], [(256, 3, 1, 1)], [(256, 3, 1, 1)]),
    "vgg": VGG_STAGES,
}
# Side of the max pool (stride 2) in front of each stage; 0 for none.
_POOLS = {"alex": (0, 3, 3, 0, 0), "vgg": (0, 2, 2, 2, 2)}


def _unit(features: Tensor) -> Tensor:
    """Scale every feature vector of a `(B, C, h, w)` map to length one, in float32 or better."""
    features = features if features.dtype == torch.float64 else features.float()
    squared = features.square().sum(dim=1, keepdim=True)
    return features / (squared.clamp_min(_MIN_SQUARED_NORM).sqrt() + 1e-10)


class LPIPS(nn.Module):
    """LPIPS v0.1 as a frozen module, for use as a metric or as a training loss.

    Args:
        net: backbone, "alex" (the metric) or "vgg" (the usual loss).
        weights: safetensors file written by `hitsr-fast weights lpips`; None means the one in the cache.

    Raises:
        LpipsWeightsNotFoundError: the file is not there; the message names the command that fetches it.
        ValueError: unknown `net`, or the file holds other tensors than those of LPIPS.

    Notes:
        Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018,
        equation 1. The weights never train. Convolutions follow autocast; the comparison of features is
        always float32 or better. Made under `torch.device("meta")` it has shapes alone, and reads no file.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: LpipsNet = "alex", weights: Path | None = None) -> None:
        super().__init__()
        if net not in _CONVS:
            raise ValueError(f"net: expected one of {get_args(LpipsNet)}, found {net!r}")
        self.net = net
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        # Nothing is initialised that the file would overwrite at once.
        with torch.device("meta"):
            self.convs, self.heads, channels = nn.ModuleList(), nn.ParameterList(), 3
            for stage in _CONVS[net]:
                convs = nn.ModuleList()
                for width, side, stride, padding in stage:
                    convs.append(nn.Conv2d(channels, width, side, stride, padding))
                    channels = width
                self.convs.append(convs)
                self.heads.append(torch.empty(channels))
        if torch.get_default_device().type != "meta":
            path = weights if weights is not None else weights_path()
            try:
                self.load_state_dict(load_weights(path, net), assign=True)
            except RuntimeError as error:
                raise ValueError(f"weights: {path} does not hold LPIPS for net={net!r}: {error}") from error
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each image in `a` to its partner in `b`: float32 `(B,)`, 0 for equal images.

        Args:
            a: floating point, `(B, 3, H, W)` in [-1, 1]. Gradients flow to it.
            b: the same shape and device; the target, without gradient.

        Raises:
            TypeError: not floating-point tensors.
            ValueError: shapes or devices differ, or a side is shorter than `MIN_SIDE[net]`.
        """
        check_pair(a, b, min_side=MIN_SIDE[self.net])
        x = (a.to(self.shift.dtype) - self.shift) / self.scale
        with torch.no_grad():
            y = (b.to(self.shift.dtype) - self.shift) / self.scale
        distance = x.new_zeros(len(x))
        for stage, head in enumerate(self.heads):
            x = self._advance(x, stage)
            with torch.no_grad():
                y = self._advance(y, stage)
                target = _unit(y)
            distance = distance + ((_unit(x) - target).square().mean(dim=(2, 3)) * head).sum(dim=1)
        return distance

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the backbone makes of images at the end of each of its five stages.

        Args:
            images: floating point, `(B, 3, H, W)` in [-1, 1], sides of at least `MIN_SIDE[net]`. Gradients
                flow to it.

        Returns:
            `(B, C, h, w)` each, after the ReLU, not yet of length one.
        """
        x, found = (images.to(self.shift.dtype) - self.shift) / self.scale, []
        for stage in range(len(self.convs)):
            x = self._advance(x, stage)
            found.append(x)
        return tuple(found)

    def _advance(self, x: Tensor, stage: int) -> Tensor:
        """Run one stage of the backbone."""
        if pool := _POOLS[self.net][stage]:
            x = functional.max_pool2d(x, pool, stride=2)
        for conv in cast(nn.ModuleList, self.convs[stage]):
            x = functional.relu(conv(x))
        return x


@functools.lru_cache(maxsize=4)
def _metric(net: LpipsNet, device: torch.device, path: Path) -> LPIPS:
    return LPIPS(net, path).to(device).eval()


def lpips(a: Tensor, b: Tensor, net: LpipsNet = "alex") -> Tensor:
    """`LPIPS` of `net` on the images' device, kept for the next call; float32 `(B,)`, lower is closer.

    Arguments and errors are those of `LPIPS` and its call.

    Notes:
        Computed in float32 whatever the autocast state. Gradients flow to `a` only.
    """
    check_pair(a, b, min_side=MIN_SIDE.get(net, 1))
    metric = _metric(net, a.device, weights_path())
    with torch.autocast(a.device.type, enabled=False):
        distance: Tensor = metric(a, b)
    return distance
