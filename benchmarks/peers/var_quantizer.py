"""VAR's multi-scale quantizer in eager PyTorch, a call for each operation of the paper: what is to be beaten.

Arithmetic, order of operations and shortcuts are those of the published models: distances from an `(N, K)`
matrix, the last scale alone left unresampled, phi from the position of a scale in its list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Scale = int | tuple[int, int]


class Encoded(NamedTuple):
    """Indices `(B, h * w)` of each scale; reconstructions `(B, C, H, W)` after each, or after the last."""

    indices: list[Tensor]
    maps: list[Tensor]


class Trained(NamedTuple):
    """The straight-through reconstruction, the loss, and each scale's indices."""

    reconstruction: Tensor
    loss: Tensor
    indices: list[Tensor]


class EagerQuantizer(nn.Module):
    """Codebook, phis, and the loops over the scales.

    Args:
        codebook: `(K, C)`.
        phi_weight: `(P, C, C, 3, 3)`.
        phi_bias: `(P, C)`.
        scales: side or (h, w) of each.
        znorm: compare directions rather than positions.
        beta: weight of the commitment.
        ratio: r of `phi(h) = (1 - r) h + r (conv(h) + bias)`.
        last_phi: false leaves phi out of the last scale, as VARSR does.
    """

    def __init__(
        self,
        codebook: Tensor,
        phi_weight: Tensor,
        phi_bias: Tensor,
        scales: Sequence[Scale],
        *,
        znorm: bool = False,
        beta: float = 0.25,
        ratio: float = 0.5,
        last_phi: bool = True,
    ) -> None:
        super().__init__()
        self.codebook = nn.Parameter(codebook.detach().clone())
        self.phi_weight = nn.Parameter(phi_weight.detach().clone())
        self.phi_bias = nn.Parameter(phi_bias.detach().clone())
        self.scales = [_pair(scale) for scale in scales]
        self.znorm, self.beta, self.ratio, self.last_phi = znorm, beta, ratio, last_phi
        count = len(phi_weight)
        margin = 1 / 3 / count if count == 4 else 1 / 2 / count
        self.ticks: list[float] = np.linspace(margin, 1 - margin, count).tolist()
        self.hits = torch.zeros(len(scales), len(codebook))
        self.recorded = 0

    def phi(self, h: Tensor, scale: int, scales: int) -> Tensor:
        """phi of scale number `scale` out of `scales`."""
        if self.ratio < 1e-6 or (scale == scales - 1 and not self.last_phi):
            return h
        position = scale / (scales - 1)
        k = min(range(len(self.ticks)), key=lambda tick: abs(self.ticks[tick] - position))
        convolved = F.conv2d(h, self.phi_weight[k], self.phi_bias[k], padding=1)
        return h.mul(1 - self.ratio) + convolved.mul(self.ratio)

    def search(self, rows: Tensor) -> Tensor:
        """Index `(N,)` of the code nearest to each row `(N, C)`."""
        codes = self.codebook.detach()
        if self.znorm:
            return (F.normalize(rows, dim=-1) @ F.normalize(codes.T, dim=0)).argmax(dim=1)
        distance = rows.square().sum(dim=1, keepdim=True) + codes.square().sum(dim=1)
        distance.addmm_(rows, codes.T, alpha=-2, beta=1)
        return distance.argmin(dim=1)

    def lookup(self, indices: Tensor, size: tuple[int, int]) -> Tensor:
        """Codes of `(B, h * w)` indices as a map `(B, C, h, w)`."""
        return F.embedding(indices, self.codebook).transpose(1, 2).unflatten(2, size)

    def add(self, h: Tensor, size: Sequence[int], scale: int, scales: int) -> Tensor:
        """What a scale's map of codes `(B, C, h, w)` adds at full size."""
        if scale != scales - 1:
            h = F.interpolate(h, size=tuple(size), mode="bicubic").contiguous()
        return self.phi(h, scale, scales)

    def encode(
        self,
        z: Tensor,
        *,
        scales: Sequence[Scale] | None = None,
        steps: int | None = None,
        replay: Sequence[Tensor] = (),
        noise: float | None = None,
        every_map: bool = False,
    ) -> Encoded:
        """Quantize `(B, C, H, W)`.

        Args:
            z: the latent.
            scales: other ones than the quantizer's own.
            steps: stop after so many of them. HIT-VAR's targets are such first steps; their last one has the
                size of the map, which stands for the position in the list that VAR goes by.
            replay: indices of the first scales, taken instead of searched.
            noise: standard deviation of what Switti adds to the pooled rows, which are shrunk for it.
            every_map: keep the reconstruction after each scale, not only after the last.
        """
        sizes = self.scales if scales is None else [_pair(scale) for scale in scales]
        residual, reconstruction = z.detach().clone(), torch.zeros_like(z)
        indices, maps = [], []
        for scale, size in enumerate(sizes[:steps]):
            last = scale == len(sizes) - 1 or size == tuple(z.shape[2:])
            if scale < len(replay):
                found = replay[scale]
            else:
                pooled = residual if last else F.interpolate(residual, size=size, mode="area")
                rows = pooled.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
                if noise is not None:
                    rows = math.sqrt(1 - noise**2) * rows + torch.randn_like(rows) * noise
                found = self.search(rows).view(len(z), -1)
            h = self.lookup(found, size)
            if not last:
                h = F.interpolate(h, size=tuple(z.shape[2:]), mode="bicubic").contiguous()
            h = self.phi(h, scale, len(sizes))
            reconstruction = reconstruction + h if every_map else reconstruction.add_(h)
            residual.sub_(h.detach())
            indices.append(found)
            maps.append(reconstruction)
        return Encoded(indices, maps if every_map else maps[-1:])

    def encode_pyramid(self, latents: Sequence[Tensor], target_steps: Sequence[int]) -> list[Encoded]:
        """HIT-VAR's Algorithm 1 as it is written: each target goes through the codes of the coarser one."""
        encoded: list[Encoded] = []
        for z, steps in zip(latents, target_steps, strict=True):
            encoded.append(self.encode(z, steps=steps, replay=encoded[-1].indices if encoded else ()))
        return encoded

    def forward(self, z: Tensor) -> Trained:
        """The training pass: a loss after each scale, and the usage of the codes."""
        encoded = self.encode(z, every_map=True)
        loss = z.new_zeros(())
        for scale, (found, reconstruction) in enumerate(zip(*encoded, strict=True)):
            loss = loss + F.mse_loss(reconstruction.detach(), z) * self.beta
            loss = loss + F.mse_loss(reconstruction, z.detach())
            hits = found.flatten().bincount(minlength=len(self.codebook)).float()
            if self.recorded == 0:
                self.hits[scale] = hits
            else:
                keep = 0.9 if self.recorded < 100 else 0.99
                self.hits[scale] = self.hits[scale] * keep + hits * (1 - keep)
            self.recorded += 1
        through = (encoded.maps[-1].detach() - z.detach()) + z
        return Trained(through, loss / len(self.scales), encoded.indices)

    def usage(self, z: Tensor, world: int = 1) -> list[float]:
        """Of each scale, the share in percent of codes that are hit often enough by batches such as `z`."""
        enough = world * (z.numel() / z.shape[1]) / len(self.codebook) * 0.08
        return [(hits >= enough).float().mean().item() * 100 for hits in self.hits]

    def decode(self, maps: Sequence[Tensor], *, every_map: bool = False) -> list[Tensor]:
        """Reconstructions after each scale, or after the last, from the maps of codes `(B, C, h, w)`."""
        total = maps[0].new_zeros(len(maps[0]), maps[0].shape[1], *self.scales[-1])
        out = []
        for scale, h in enumerate(maps):
            added = self.add(h, self.scales[-1], scale, len(self.scales))
            total = total + added if every_map else total.add_(added)
            out.append(total)
        return out if every_map else out[-1:]

    def teacher_inputs(self, indices: Sequence[Tensor]) -> Tensor:
        """`(B, T - tokens of the first scale, C)`: the reconstruction so far, pooled to each next scale."""
        total = self.codebook.new_zeros(len(indices[0]), self.codebook.shape[1], *self.scales[-1])
        rows = []
        for scale, following in enumerate(self.scales[1:]):
            h = self.lookup(indices[scale], self.scales[scale])
            total = total + self.add(h, self.scales[-1], scale, len(self.scales))
            rows.append(F.interpolate(total, size=following, mode="area").flatten(2).transpose(1, 2))
        return torch.cat(rows, dim=1)

    def step(self, scale: int, reconstruction: Tensor, h: Tensor) -> Tensor:
        """The sampler's step: adds a map of codes in place; the next scale's input, or the reconstruction."""
        reconstruction.add_(self.add(h, reconstruction.shape[2:], scale, len(self.scales)))
        if scale == len(self.scales) - 1:
            return reconstruction
        return F.interpolate(reconstruction, size=self.scales[scale + 1], mode="area")


def _pair(scale: Scale) -> tuple[int, int]:
    return (scale, scale) if isinstance(scale, int) else (scale[0], scale[1])
