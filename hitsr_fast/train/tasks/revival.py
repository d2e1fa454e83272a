"""Codes that hardly any token takes are replaced by what is left to code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.nn.quantizer import ResidualQuantizer
from hitsr_fast.train.draw import Draw
from hitsr_fast.transfer import to_device


class CodeRevival(nn.Module):
    """Counts how often each code is taken, over all processes, and replaces the rare ones at fixed steps.

    The new codes are residuals of the samples of that step, at scales and places that are drawn by sample:
    the same whatever the number of processes. Nothing is read back. What is counted so far is part of a
    checkpoint.

    Args:
        codes: K.
        below: Share of the tokens since the last time below which a code is replaced.
        every: Steps from one time to the next.
        batch: Samples of a step, over all processes.
    """

    used: Tensor

    def __init__(self, codes: int, below: float, every: int, batch: int) -> None:
        super().__init__()
        self.below, self.every = below, every
        self.rows = math.ceil(codes / batch)  # a sample gives: enough for a codebook of dead codes
        self.register_buffer("used", torch.zeros(codes, dtype=torch.int64))
        self._counts: list[Tensor] = []
        self._found: list[tuple[Tensor, Tensor]] = []  # global indices and rows of the step's samples

    @torch.no_grad()
    def see(
        self,
        quantizer: ResidualQuantizer,
        targets: Sequence[int],
        latents: Sequence[Tensor],
        indices: Tensor,
        counts: Tensor,
        step: int,
        draw: Draw,
    ) -> None:
        """Take note of some samples of a step.

        Args:
            quantizer: Codebook and phis.
            targets, latents: Numbers of the targets, and their maps `(B, C, h, w)`.
            indices: Tokens `(B, T)`.
            counts: Of each scale's codes, `(S, K)`.
            step: Its number.
            draw: Of the samples.
        """
        self._counts.append(counts.sum(0))
        if (step + 1) % self.every:
            return
        residuals = searched_rows(quantizer, targets, latents, indices)
        lengths = torch.tensor(quantizer.pyramid.lengths)
        first, length = to_device(torch.stack([lengths.cumsum(0) - lengths, lengths]), indices.device)
        scale = draw.integers("revive/scale", len(lengths), self.rows)
        place = (draw.uniform("revive/place", self.rows) * length[scale]).long()
        chosen = (first[scale] + place)[..., None].expand(-1, -1, residuals.shape[2])
        index = to_device(draw.index, indices.device)
        self._found.append((index, residuals.gather(1, chosen)))

    @torch.no_grad()
    def after_step(self, codebook: Tensor, step: int) -> None:
        """Count a step that is done; replace rare codes of the codebook `(K, C)`, in place, if it is time."""
        counts = torch.stack(self._counts).sum(0)
        self._counts.clear()
        _sum_over_processes(counts)
        self.used += counts
        if (step + 1) % self.every:
            return
        index = _of_all_processes(torch.cat([index for index, _ in self._found]))
        rows = _of_all_processes(torch.cat([rows for _, rows in self._found]))
        self._found.clear()
        # One row of each sample after the other: neighbours among the new codes are of different samples.
        candidates = rows[index.argsort()].transpose(0, 1).flatten(0, 1)
        dead = self.used < self.below * self.used.sum()
        number = (dead.cumsum(0) - 1).clamp_min(0)
        dead &= candidates[number].isfinite().all(1)  # as those of a step that is skipped may not be
        codebook.copy_(torch.where(dead[:, None], candidates[number].to(codebook.dtype), codebook))
        self.used.zero_()


def searched_rows(
    quantizer: ResidualQuantizer, targets: Sequence[int], latents: Sequence[Tensor], indices: Tensor
) -> Tensor:
    """What was searched for each token: pooled residuals as rows, `(B, T, C)` of tokens `(B, T)`."""
    pyramid = quantizer.pyramid
    rows: list[Tensor] = []
    for target, latent in zip(targets, latents, strict=True):
        known = indices[:, : pyramid.ends[pyramid.steps[target] - 1]]
        reconstructions = quantizer.decode(known, target, per_scale=True).reconstructions
        assert reconstructions is not None
        for step in range(len(rows), pyramid.steps[target]):
            residual = latent if step == 0 else latent - reconstructions[step - 1]
            rows.append(F.adaptive_avg_pool2d(residual, pyramid.sizes[step]).flatten(2).transpose(1, 2))
    return torch.cat(rows, 1)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sum_over_processes(counts: Tensor) -> None:
    if _distributed():
        dist.all_reduce(counts)


def _of_all_processes(rows: Tensor) -> Tensor:
    if not _distributed():
        return rows
    every = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(every, rows.contiguous())
    return torch.cat(every)
