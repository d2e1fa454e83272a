"""Tokens with mistakes in them, and the labels that would mend the mistakes.

Under teacher forcing a next-scale model never sees a wrong token, at inference it sees its own. Infinity
(arXiv 2412.04431, section 3.3) flips some of the input tokens in training and quantizes what is then left
over, so that later scales learn to correct earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hitsr_fast.nn.quantizer import ResidualQuantizer
from hitsr_fast.train.draw import Draw


@torch.no_grad()
def code_neighbours(codebook: Tensor, count: int) -> Tensor:
    """The nearest other codes of each code `(K, C)`: int64 `(K, count)`, nearest first, at most K - 1.

    A code's equal under another index counts as another code.
    """
    if not 1 <= count < len(codebook):
        raise ValueError(f"count: expected a value in [1, {len(codebook) - 1}], found {count}")
    distance = torch.cdist(codebook.float(), codebook.float())
    return distance.fill_diagonal_(torch.inf).topk(count, largest=False).indices


@torch.no_grad()
def tokenize_with_mistakes(
    quantizer: ResidualQuantizer,
    latents: Sequence[Tensor],
    neighbours: Tensor,
    max_rate: float,
    draw: Draw,
    *,
    hierarchical: bool = True,
) -> tuple[Tensor, Tensor]:
    """Tokenize by Algorithm 1 while some tokens are swapped for a near code.

    Args:
        quantizer: Codebook and phi bank.
        latents: One `(B, C, h, w)` map a target, coarsest first; of the last target alone where the tokens
            are plain ones.
        neighbours: From `code_neighbours`.
        max_rate: A sample's rate of mistakes is uniform in [0, max_rate].
        draw: Source of the mistakes.
        hierarchical: False quantizes the last target alone, as VAR does.

    Returns:
        labels: `(B, T)` int64, at each step the codes nearest to what is really left over.
        inputs: `(B, T)` int64, the tokens with the mistakes, of which the teacher inputs are made.
    """
    batch, device = latents[0].shape[0], latents[0].device
    rate = draw.uniform("mistakes/rate", 1) * max_rate
    labels = torch.empty(batch, 0, dtype=torch.int64, device=device)
    inputs = labels
    pyramid, banks = quantizer.pyramid, quantizer.banks()
    steps = pyramid.steps
    if not hierarchical:
        banks, steps = banks[-1:], steps[-1:]
    prepared = quantizer.prepared()
    for latent, bank, first, last in zip(latents, banks, (0, *steps), steps, strict=False):
        for step in range(first, last):
            scales = pyramid.scales[: step + 1]
            found = bank.quantize(latent.float(), scales, replay=inputs, prepared=prepared)
            indices = found.indices[:, inputs.shape[1] :]
            length = indices.shape[1]
            wrong = draw.uniform(f"mistakes/{step}", length) < rate
            choice = draw.integers(f"mistakes/code/{step}", neighbours.shape[1], length)
            labels = torch.cat([labels, indices], 1)
            inputs = torch.cat([inputs, torch.where(wrong, neighbours[indices, choice], indices)], 1)
    return labels, inputs
