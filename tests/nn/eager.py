"""The eager quantizer with the weights of a module, and weights that make a good test."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.var_quantizer import EagerQuantizer
from hitsr_fast.nn import ResidualQuantizer
from hitsr_fast.nn.phi_bank import Phi, PhiBank


def randomize(quantizer: ResidualQuantizer) -> None:
    """Codes of order one half; convolutions as they are made, which keep a map's size."""
    with torch.no_grad():
        quantizer.embedding.weight.normal_(std=0.5)


def eager_of(quantizer: ResidualQuantizer, *, last_phi: bool = True) -> EagerQuantizer:
    return EagerQuantizer(
        *quantizer.bank(),
        quantizer.scales,
        znorm=quantizer.metric == "cosine",
        beta=quantizer.commitment,
        ratio=quantizer.phi_ratio,
        last_phi=last_phi,
    )


def phi_gradients(bank: PhiBank) -> tuple[Tensor, Tensor]:
    """`(P, C, C, 3, 3)` and `(P, C)`."""
    phis = [phi for phi in bank.phis if isinstance(phi, Phi)]
    weights = [torch.zeros_like(phi.weight) if phi.weight.grad is None else phi.weight.grad for phi in phis]
    biases = [phi.weight.new_zeros(len(phi.weight)) for phi in phis]
    for phi, bias in zip(phis, biases, strict=True):
        if phi.bias is not None and phi.bias.grad is not None:
            bias.copy_(phi.bias.grad)
    return torch.stack(weights), torch.stack(biases)
