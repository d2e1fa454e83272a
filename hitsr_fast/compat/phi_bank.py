"""The phi convolutions of VAR's quantizer as modules, with the names that its checkpoints give them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hitsr_fast.ops import nearest_phi


class Phi(nn.Conv2d):
    """`phi(h) = (1 - r) h + r (conv3x3(h) + bias)`."""

    undecayed = ("weight", "bias")

    def __init__(self, code_dim: int, ratio: float) -> None:
        super().__init__(code_dim, code_dim, 3, padding=1)
        self.resi_ratio = ratio

    def forward(self, h: Tensor) -> Tensor:
        """Of a map `(B, C, H, W)`."""
        return (1 - self.resi_ratio) * h + self.resi_ratio * super().forward(h)


class PhiBank(nn.Module):
    """The phis; an item is the one nearest to a position from 0 to 1.

    Args:
        code_dim: channels.
        ratio: r; where it is 0, the phis are identities without parameters.
        count: number of phis.
        shared: whether all scales share them, rather than having one each.
    """

    def __init__(self, code_dim: int, ratio: float, count: int, shared: bool) -> None:
        super().__init__()
        phis = [Phi(code_dim, ratio) if ratio > 0 else nn.Identity() for _ in range(count)]
        if not shared:
            for number, phi in enumerate(phis):
                self.add_module(str(number), phi)
        elif count == 1:
            self.qresi = phis[0]
        else:
            self.qresi_ls = nn.ModuleList(phis)

    @property
    def phis(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, Phi | nn.Identity)]

    def __len__(self) -> int:
        return len(self.phis)

    def __getitem__(self, position: float) -> nn.Module:
        return self.phis[nearest_phi(position, len(self))]

    def stacked(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weights `(P, C, C, 3, 3)` and biases `(P, C)` for the ops; zeros `like` it without phis."""
        convolutions = [phi for phi in self.phis if isinstance(phi, Phi)]
        if not convolutions:
            C, P = like.shape[1], len(self)
            return like.new_zeros(P, C, C, 3, 3), like.new_zeros(P, C)
        biases = [phi.bias for phi in convolutions if phi.bias is not None]  # a Phi always has one
        return torch.stack([phi.weight for phi in convolutions]), torch.stack(biases)
