"""NIQE, the natural image quality evaluator: a quality without a reference, in plain PyTorch."""

from __future__ import annotations

import functools
import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hitsr_fast.metrics._pairs import inner_image, luma
from hitsr_fast.metrics.resize import imresize
from hitsr_fast.metrics.weights import PackagedFile, WeightsError, WeightsSource

BLOCK = 96
# The spread of one block's features is not known: two blocks at least. A picture with sides of two has four.
MIN_SIDE = 2 * BLOCK

_SHAPES = {"mu_pris_param": (1, 36), "cov_pris_param": (36, 36), "gaussian_window": (7, 7)}

# Neighbours whose products are looked at: to the right, below, and on both diagonals.
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))

# What numpy's pinv takes for zero, over the largest singular value.
_PINV_CUTOFF = 1e-15


def convert(files: Mapping[str, bytes]) -> dict[str, Tensor]:
    """The statistics of natural pictures out of the `.npz`, float64: `mean`, `covariance`, `window`.

    Raises:
        WeightsError: the file holds something else than these arrays.
    """
    (content,) = files.values()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name].astype(np.float64, order="C")) for name in _SHAPES}
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise WeightsError(
            f"{SOURCE.files['parameters'].member}: expected {list(_SHAPES)} ({error})"
        ) from error
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != _SHAPES:
        raise WeightsError(f"{SOURCE.files['parameters'].member}: expected shapes {_SHAPES}, found {found}")
    names = ("mean", "covariance", "window")
    return dict(zip(names, (tensors["mu_pris_param"][0], *list(tensors.values())[1:]), strict=True))


SOURCE = WeightsSource(
    name="niqe",
    requirement="basicsr==1.4.2",
    archive="basicsr-1.4.2.tar.gz",
    sha256="b89b595a87ef964cda9913b4d99380ddb6554c965577c0c10cb7b78e31301e87",
    files={
        "parameters": PackagedFile(
            member="basicsr-1.4.2/basicsr/metrics/niqe_pris_params.npz",
            sha256="2a7c182a68c9e7f1b2e2e5ec723279d6f65d912b6fcaf37eb2bf03d7367c4296",
        )
    },
    convert=convert,
)


def niqe(images: Tensor, border: int = 0) -> Tensor:
    """Distance of a picture's local statistics to those of natural pictures; lower is better.

    Args:
        images: floating point, `(B, 3, H, W)` RGB in [0, 1].
        border: pixels left out on each side.

    Returns:
        float64 `(B,)`; NaN where fewer than two blocks have any contrast.

    Raises:
        WeightsNotFoundError: no parameters in the cache; the message names the command that fetches them.
        TypeError: not a floating-point tensor, or `border` is not an integer.
        ValueError: another shape, a negative border, or fewer than two whole blocks of 96 x 96 px within it.

    Notes:
        Mittal et al., "Making a Completely Blind Image Quality Analyzer", 2013, as basicsr 1.4.2 has it, with
        its parameters: luma as of `psnr_y`, rounded; blocks of 96 px without overlap, from the top left, what
        is left over at the right and bottom not looked at; the second scale by `imresize`; neighbours taken
        around the block's edge; asymmetric Gaussians fitted on a grid of 0.001. Products are rounded to
        float32 where basicsr rounds them: whether a pixel of a flat area counts as zero depends on it.
    """
    inside = inner_image("images", images, border=border, min_side=1)
    rows, columns = (side // BLOCK for side in inside.shape[2:])
    if rows * columns < 2:
        size = tuple(inside.shape[2:])
        raise ValueError(
            f"images: expected two whole blocks of 96 x 96 px within the border, found {size} px"
        )
    parameters = _parameters(SOURCE.path, images.device)
    # A level in between, as one pixel in 85,000 has, goes where basicsr's roundings send it.
    planes = ((luma(inside[..., : rows * BLOCK, : columns * BLOCK]) / 255).float() * 255).round()
    return torch.stack([_niqe(plane, parameters) for plane in planes])


@functools.lru_cache(maxsize=2)
def _parameters(path: Path, device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in SOURCE.load(path).items()}


def _niqe(plane: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """Of one luma plane, float32 `(1, H, W)` of whole blocks."""
    features = []
    for block in (BLOCK, BLOCK // 2):
        if block < BLOCK:
            plane = (imresize((plane / 255).double(), 0.5).float() * 255).contiguous()
        normalized = _normalize(plane, parameters["window"])
        blocks = functional.unfold(normalized[None], block, stride=block)[0].T.unflatten(1, (block, block))
        features.append(_features(blocks))
    found = torch.cat(features, dim=1)
    whole = found[~found.isnan().any(dim=1)]
    if len(whole) < 2:
        return found.new_tensor(math.nan)
    gap = parameters["mean"] - found.nanmean(dim=0)
    spread = torch.linalg.pinv((parameters["covariance"] + whole.T.cov()) / 2, rtol=_PINV_CUTOFF)
    distance: Tensor = (gap @ spread @ gap).sqrt()
    return distance


def _normalize(plane: Tensor, window: Tensor) -> Tensor:
    """Without the local mean, over the local deviation and one: equation 1."""

    def blur(values: Tensor) -> Tensor:
        padded = functional.pad(values.double()[None], (3, 3, 3, 3), mode="replicate")
        return functional.conv2d(padded, window[None, None])[0].float()

    mean = blur(plane)
    deviation = (blur(plane.square()) - mean.square()).abs().sqrt()
    return (plane - mean) / (deviation + 1)


def _features(blocks: Tensor) -> Tensor:
    """Float64 `(N, 18)` of float32 blocks `(N, h, w)`."""
    alpha, left, right = fit_asymmetric(blocks)
    features = [alpha, (left + right) / 2]
    for shift in _SHIFTS:
        alpha, left, right = fit_asymmetric(blocks * blocks.roll(shift, dims=(1, 2)))
        mean = (right - left) * (torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha)).exp()
        features += [alpha, mean, left, right]
    return torch.stack(features, dim=1)


def fit_asymmetric(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape and both widths of an asymmetric generalized Gaussian for each block: equations 7 and 8."""
    values = blocks.flatten(1)
    squares, everywhere = values.square(), torch.ones_like(values, dtype=torch.bool)
    # NaN where no value is on a side.
    left, right = (_mean(squares, side).sqrt() for side in (values < 0, values > 0))
    ratio = left / right
    spread = _mean(values.abs(), everywhere).square() / _mean(squares, everywhere)
    wanted = (spread * (ratio**3 + 1) * (ratio + 1) / (ratio.square() + 1).square()).double()
    grid, spreads = _shapes(blocks.device)
    above = torch.searchsorted(spreads, wanted).clamp(1, len(grid) - 1)
    below = above - 1
    nearest = torch.where(wanted - spreads[below] <= spreads[above] - wanted, below, above)
    # basicsr's fit of nothing is the first shape of the grid.
    alpha = grid[torch.where(wanted.isnan(), 0, nearest)]
    width = ((torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)) / 2).exp()
    return alpha, left * width, right * width


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Of the chosen values in each row, rounded to float32."""
    return ((values.double() * chosen).sum(dim=1) / chosen.sum(dim=1)).float()


@functools.lru_cache(maxsize=2)
def _shapes(device: torch.device) -> tuple[Tensor, Tensor]:
    """The shapes that are tried, and of each the squared mean of magnitudes over the mean of squares."""
    grid = 0.2 + 0.001 * torch.arange(9801, dtype=torch.float64, device=device)
    one, two, three = (torch.lgamma(k / grid) for k in (1, 2, 3))
    return grid, (2 * two - one - three).exp()
