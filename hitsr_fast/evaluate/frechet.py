"""A Fréchet distance on features of VGG16: a stand-in for FID where there is no Inception-v3, under its own
name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hitsr_fast.metrics import LPIPS


@dataclass(frozen=True)
class SetColumn:
    """A column of a report whose numbers belong to whole sets."""

    key: str
    title: str
    digits: int

    def format(self, value: float) -> str:
        """A cell of the table; "-" where nothing was measured."""
        return "-" if math.isnan(value) else f"{value:.{self.digits}f}"


FD_VGG: Final = SetColumn("fd_vgg", "FD-VGG", 2)


class VggFeatures:
    """Means over all places of VGG16's last convolutions: images `(B, 3, H, W)` in [0, 1] to float64 `(B,
    512)`.

    The weights are those of LPIPS; sides of at least 16 px.

    Raises:
        LpipsWeightsNotFoundError: they are not there; the message names the command that fetches them.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._net = LPIPS("vgg").to(device).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        last = self._net.features(images.to(self._net.shift) * 2 - 1)[-1]
        return last.mean(dim=(2, 3)).double().cpu()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of two normal distributions fitted to features float64 `(N, D)` and `(M, D)`.

    NaN where one of them has fewer than two rows.

    Notes:
        `|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))`, Heusel et al., 2017, equation 6. With fewer
        images than features the covariances are singular, and the value depends on the number of images:
        compare equal numbers. The trace of the root is the sum of the singular values of the product of the
        centred features.
    """
    if min(len(a), len(b)) < 2:
        return math.nan
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    centred_a = (a - mean_a) / (len(a) - 1) ** 0.5
    centred_b = (b - mean_b) / (len(b) - 1) ** 0.5
    # S = X^T X: the eigenvalues of S_a S_b are the squared singular values of X_a X_b^T.
    root = torch.linalg.svdvals(centred_a @ centred_b.T).sum()
    traces = centred_a.square().sum() + centred_b.square().sum()
    return float((mean_a - mean_b).square().sum() + traces - 2 * root)
