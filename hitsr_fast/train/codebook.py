"""Filling a codebook from data: k-means on the pooled residuals of all scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.nn.quantizer import ResidualQuantizer
from hitsr_fast.ops import nearest_code


@torch.no_grad()
def fill_codebook(
    quantizer: ResidualQuantizer,
    latents: Sequence[Tensor],
    *,
    rounds: int = 3,
    iterations: int = 8,
    per_scale: int = 24_000,
    seed: int = 0,
    hierarchical: bool = True,
) -> dict[str, float]:
    """Replace the codebook by k-means centres and set every phi convolution to the identity.

    The residual that a scale sees depends on the codes of the scales before it. So the first round quantizes
    as if every pooled residual were a code of its own, and each further round with the codebook of the round
    before.

    Args:
        quantizer: Changed in place.
        latents: One `(N, C, h, w)` map a target, coarsest first, of the same images; of the last target alone
            for plain tokens.
        rounds, iterations: Of collecting residuals and running k-means on them; of Lloyd's in each.
        per_scale: Rows taken of each scale, so that fine scales do not crowd out coarse ones.
        seed: Of the draws.
        hierarchical: False quantizes the last target alone, as VAR does.

    Returns:
        Share of codes in use and mean squared error of the last iteration.
    """
    generator = torch.Generator().manual_seed(seed)
    for phi in quantizer.phi_weight:
        torch.nn.init.dirac_(phi)
    quantizer.phi_bias.zero_()
    codebook = None
    used, error = 0.0, 0.0
    for _ in range(rounds):
        found = _pooled_residuals(quantizer, latents, codebook, hierarchical=hierarchical)
        rows = torch.cat([r[torch.randperm(len(r), generator=generator)[:per_scale]] for r in found])
        if codebook is None:
            chosen = torch.randperm(len(rows), generator=generator)[: len(quantizer.codebook)]
            codebook = rows[chosen].clone()
        for _ in range(iterations):
            index = nearest_code(rows, codebook)
            count = torch.bincount(index, minlength=len(codebook))
            sums = torch.zeros_like(codebook).index_add_(0, index, rows)
            empty = count == 0
            used = 1.0 - empty.float().mean().item()
            error = F.mse_loss(codebook[index], rows).item()
            codebook = sums / count.clamp_min(1)[:, None]
            fresh = torch.randint(len(rows), (int(empty.sum()),), generator=generator)
            codebook[empty] = rows[fresh]
        quantizer.codebook.copy_(codebook)
    return {"codes_used": used, "kmeans_mse": error}


def _pooled_residuals(
    quantizer: ResidualQuantizer,
    latents: Sequence[Tensor],
    codebook: Tensor | None,
    *,
    hierarchical: bool = True,
) -> list[Tensor]:
    """What is searched at each scale where every phi is the identity: rows `(N * h * w, C)`.

    With no codebook each row is its own code. Other arguments: see `fill_codebook`.
    """
    maps: list[Tensor] = []
    rows: list[Tensor] = []
    pyramid = quantizer.pyramid
    targets = range(len(pyramid.targets))[None if hierarchical else -1 :]
    for target, latent in zip(targets, latents, strict=True):
        residual = latent.float().clone()
        for step, size in enumerate(pyramid.sizes[: pyramid.steps[target]]):
            if step == len(maps):
                pooled = F.adaptive_avg_pool2d(residual, size)
                searched = pooled.permute(0, 2, 3, 1).reshape(-1, pooled.shape[1])
                rows.append(searched)
                codes = searched if codebook is None else codebook[nearest_code(searched, codebook)]
                maps.append(codes.view(pooled.shape[0], *size, -1).permute(0, 3, 1, 2))
            code_map = maps[step]
            if size != pyramid.targets[target]:
                code_map = F.interpolate(code_map, latent.shape[2:], mode="bicubic", align_corners=False)
            residual -= code_map
    return rows
