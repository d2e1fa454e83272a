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
from hitsr_fast.ops import prepare_codebook


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
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Tokenize by Algorithm 1 while some tokens are swapped for a near code.

    Args:
        quantizer: Codebook and phi bank.
        latents: One `(B, C, h, w)` map a target, coarsest first.
        neighbours: From `code_neighbours`.
        max_rate: A sample's rate of mistakes is uniform in [0, max_rate].
        generator: Source of the mistakes, on the CPU.

    Returns:
        labels: `(B, T)` int64, at each step the codes nearest to what is really left over.
        inputs: `(B, T)` int64, the tokens with the mistakes, of which the teacher inputs are made.
    """
    batch = latents[0].shape[0]
    rate = torch.rand(batch, 1, generator=generator) * max_rate
    labels = torch.empty(batch, 0, dtype=torch.int64, device=latents[0].device)
    inputs = labels
    pyramid = quantizer.pyramid
    prepared = prepare_codebook(quantizer.codebook)
    for latent, bank, first, last in zip(
        latents, quantizer.banks(), (0, *pyramid.steps), pyramid.steps, strict=False
    ):
        for step in range(first, last):
            scales = pyramid.scales[: step + 1]
            found = bank.quantize(latent.float(), scales, replay=inputs, prepared=prepared)
            indices = found.indices[:, inputs.shape[1] :]
            wrong = torch.rand(indices.shape, generator=generator) < rate
            choice = torch.randint(neighbours.shape[1], indices.shape, generator=generator)
            swapped = neighbours[indices, choice.to(indices.device)]
            labels = torch.cat([labels, indices], 1)
            inputs = torch.cat([inputs, torch.where(wrong.to(indices.device), swapped, indices)], 1)
    return labels, inputs
