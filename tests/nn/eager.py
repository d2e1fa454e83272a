"""The eager quantizer with the weights of a module, and weights that make a good test."""

from __future__ import annotations

import torch

from benchmarks.peers.var_quantizer import EagerQuantizer
from hitsr_fast.nn import ResidualQuantizer


def randomize(quantizer: ResidualQuantizer) -> None:
    """Codes of order one half; convolutions as they are made, which keep a map's size."""
    with torch.no_grad():
        quantizer.bank().codebook.normal_(std=0.5)


def eager_of(quantizer: ResidualQuantizer, *, last_phi: bool = True) -> EagerQuantizer:
    return EagerQuantizer(
        *quantizer.bank().tensors,
        quantizer.pyramid.scales,
        znorm=quantizer.metric == "cosine",
        beta=quantizer.commitment,
        ratio=quantizer.phi_ratio,
        last_phi=last_phi,
    )
