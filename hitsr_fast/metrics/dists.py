"""DISTS, the distance of deep structure and texture, in plain PyTorch."""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hitsr_fast.checks import check_pair
from hitsr_fast.metrics import lpips_weights
from hitsr_fast.metrics.lpips import VGG_STAGES
from hitsr_fast.metrics.weights import PackagedFile, WeightsError, WeightsSource

# ImageNet mean and standard deviation.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)

# Of the picture itself and of the five stages.
_CHANNELS = (3, *(stage[-1][0] for stage in VGG_STAGES))

# Keep the quotients finite where a feature map is empty or flat.
_C1 = _C2 = 1e-6
_POOL_FLOOR = 1e-12

# Middle of a Hann window of five taps.
_HANN = (0.5, 1.0, 0.5)


def convert(files: Mapping[str, bytes]) -> dict[str, Tensor]:
    """The weights `alpha` of texture and `beta` of structure, each `(1475,)`, out of the checkpoint.

    Raises:
        WeightsError: the file holds something else than these tensors.
    """
    (checkpoint,) = files.values()
    try:
        loaded = torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=True)
        return {
            name: loaded[name].detach().float().reshape(sum(_CHANNELS)).clone() for name in ("alpha", "beta")
        }
    except (pickle.UnpicklingError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise WeightsError(
            f"{SOURCE.files['heads'].member}: expected tensors alpha and beta ({error})"
        ) from error


SOURCE = WeightsSource(
    name="dists",
    requirement="DISTS_pytorch==0.1",
    archive="DISTS_pytorch-0.1-py3-none-any.whl",
    sha256="73e54ce13e7cf3ca962ee8e433d129884ec3dc75e00a27af90525e1da760ac61",
    files={
        "heads": PackagedFile(
            member="DISTS_pytorch/weights.pt",
            sha256="f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218",
        )
    },
    convert=convert,
)


def missing_dists() -> str | None:
    """Why DISTS cannot be measured here, with the commands that help; None where it can."""
    return SOURCE.missing() or lpips_weights.SOURCE.missing()


class DISTS(nn.Module):
    """DISTS as a frozen module, for use as a metric or as a training loss.

    Args:
        weights: safetensors file written by `hitsr-fast weights dists`; None means the one in the cache.
        backbone: that of `hitsr-fast weights lpips`, whose VGG16 DISTS looks through; None as before.

    Raises:
        WeightsNotFoundError: a file is not there; the message names the command that fetches it.
        ValueError: a file holds other tensors than those of DISTS.

    Notes:
        Ding et al., "Image Quality Assessment: Unifying Structure and Texture Similarity", 2020, with the
        authors' weights and constants (`DISTS_pytorch` 0.1): VGG16 whose pools are the root of a mean of
        squares under a Hann window, compared by the means and covariances of its maps after each of the five
        stages and of the picture itself. The picture is not resized. Convolutions follow autocast; the
        comparison is always float32 or better.
    """

    mean: Tensor
    std: Tensor
    hann: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, weights: Path | None = None, backbone: Path | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        taps = torch.tensor(_HANN)
        hann = taps[:, None] * taps / taps.sum().square()
        self.register_buffer("hann", hann[None, None], persistent=False)
        with torch.device("meta"):
            self.convs, channels = nn.ModuleList(), 3
            for stage in VGG_STAGES:
                convs = nn.ModuleList()
                for width, side, stride, padding in stage:
                    convs.append(nn.Conv2d(channels, width, side, stride, padding))
                    channels = width
                self.convs.append(convs)
            self.alpha = nn.Parameter(torch.empty(sum(_CHANNELS)))
            self.beta = nn.Parameter(torch.empty(sum(_CHANNELS)))
        heads = weights if weights is not None else SOURCE.path
        vgg = backbone if backbone is not None else lpips_weights.SOURCE.path
        tensors = SOURCE.load(heads) | lpips_weights.SOURCE.load(vgg, "vgg.")
        tensors = {name: value for name, value in tensors.items() if not name.startswith("heads.")}
        try:
            self.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(f"weights: {heads} and {vgg} do not hold DISTS: {error}") from error
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each image in `a` to its partner in `b`: `(B,)`, 0 for equal images but for rounding.

        Args:
            a: floating point, `(B, 3, H, W)` in [0, 1]. Gradients flow to it.
            b: the same shape and device; the target, without gradient.

        Returns:
            The dtype of the weights, float32 unless the module was converted.

        Raises:
            TypeError: not floating-point tensors.
            ValueError: shapes or devices differ, or a side is empty.
        """
        check_pair(a, b, min_side=1)
        x, y = a.to(self.mean.dtype), b.detach().to(self.mean.dtype)
        weight = self.alpha.sum() + self.beta.sum()
        alphas, betas = self.alpha.split(_CHANNELS), self.beta.split(_CHANNELS)
        similarity = self._similarity(x, y, alphas[0], betas[0])
        x = (x - self.mean) / self.std
        y = (y - self.mean) / self.std
        for stage in range(len(VGG_STAGES)):
            x = self._advance(x, stage)
            with torch.no_grad():
                y = self._advance(y, stage)
            similarity = similarity + self._similarity(x, y, alphas[stage + 1], betas[stage + 1])
        return 1 - similarity / weight

    def _advance(self, x: Tensor, stage: int) -> Tensor:
        """Run one stage of the backbone, with the pool in front of it."""
        if stage > 0:
            kernel = self.hann.to(x.dtype).expand(x.shape[1], 1, 3, 3)
            squares = functional.conv2d(x.square(), kernel, stride=2, padding=1, groups=x.shape[1])
            x = (squares + _POOL_FLOOR).sqrt()
        for conv in cast(nn.ModuleList, self.convs[stage]):
            x = functional.relu(conv(x))
        return x

    def _similarity(self, x: Tensor, y: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        """Weighted texture and structure of two feature maps, `(B,)`."""
        x, y = x.to(self.mean.dtype), y.to(self.mean.dtype)
        mean_x, mean_y = x.mean(dim=(2, 3)), y.mean(dim=(2, 3))
        texture = (2 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
        # About the means, so that flat maps of high values keep their digits.
        x, y = x - mean_x[..., None, None], y - mean_y[..., None, None]
        covariance = (x * y).mean(dim=(2, 3))
        variances = x.square().mean(dim=(2, 3)) + y.square().mean(dim=(2, 3))
        structure = (2 * covariance + _C2) / (variances + _C2)
        return (alpha * texture + beta * structure).sum(dim=1)


@functools.lru_cache(maxsize=2)
def _metric(device: torch.device, weights: Path, backbone: Path) -> DISTS:
    return DISTS(weights, backbone).to(device).eval()


def dists(a: Tensor, b: Tensor) -> Tensor:
    """`DISTS` on the images' device, kept for the next call; float32 `(B,)`, lower is closer.

    Arguments and errors are those of `DISTS` and its call.

    Notes:
        Computed in float32 whatever the autocast state. Gradients flow to `a` only.
    """
    check_pair(a, b, min_side=1)
    metric = _metric(a.device, SOURCE.path, lpips_weights.SOURCE.path)
    with torch.autocast(a.device.type, enabled=False):
        distance: Tensor = metric(a, b)
    return distance
