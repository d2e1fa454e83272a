"""The phi convolutions of VAR's quantizer as modules, with the names that its checkpoints give them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hitsr_fast.ops import nearest_phi


class Phi(nn.Conv2d):
    """`phi(h) = (1 - r) h + r (conv3x3(h) + bias)`."""

    def __init__(self, code_dim: int, ratio: float) -> None:
        super().__init__(code_dim, code_dim, 3, padding=1)
        self.resi_ratio = ratio

    def forward(self, h: Tensor) -> Tensor:
        """Of a map `(B, C, H, W)`."""
        return (1 - self.resi_ratio) * h + self.resi_ratio * super().forward(h)


def _phi(code_dim: int, ratio: float) -> nn.Module:
    return Phi(code_dim, ratio) if ratio > 0 else nn.Identity()


class SharedPhi(nn.Module):
    """One phi for all scales."""

    def __init__(self, code_dim: int, ratio: float) -> None:
        super().__init__()
        self.qresi = _phi(code_dim, ratio)

    @property
    def phis(self) -> list[nn.Module]:
        return [self.qresi]

    def __getitem__(self, position: float) -> nn.Module:
        return self.qresi


class PartiallySharedPhi(nn.Module):
    """A few phis; each scale uses the one nearest to its position."""

    def __init__(self, code_dim: int, ratio: float, count: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(_phi(code_dim, ratio) for _ in range(count))

    @property
    def phis(self) -> list[nn.Module]:
        return list(self.qresi_ls)

    def __getitem__(self, position: float) -> nn.Module:
        return self.qresi_ls[nearest_phi(position, len(self.qresi_ls))]


class SeparatePhi(nn.ModuleList):
    """A phi for each scale; in a list of another length a scale uses the one nearest to its position."""

    def __init__(self, code_dim: int, ratio: float, count: int) -> None:
        super().__init__(_phi(code_dim, ratio) for _ in range(count))

    @property
    def phis(self) -> list[nn.Module]:
        return list(self)

    def __getitem__(self, position: float) -> nn.Module:  # type: ignore[override]
        return self.phis[nearest_phi(position, len(self))]


PhiBank = SharedPhi | PartiallySharedPhi | SeparatePhi


def phi_bank(code_dim: int, ratio: float, share: int, separate: int) -> PhiBank:
    """A bank with the names of VAR's checkpoints; an item is the phi at a position from 0 to 1.

    Args:
        code_dim: channels.
        ratio: r; where it is 0, the phis are identities without parameters.
        share: number of phis that all scales share; 0 for separate ones.
        separate: their number where `share` is 0.
    """
    if share == 0:
        return SeparatePhi(code_dim, ratio, separate)
    return SharedPhi(code_dim, ratio) if share == 1 else PartiallySharedPhi(code_dim, ratio, share)


def stacked(bank: PhiBank, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weights `(P, C, C, 3, 3)` and biases `(P, C)` of a bank as the ops take them, zeros where it has none.

    Args:
        bank: of P phis.
        like: the codebook, for the dtype and device of those zeros.
    """
    convolutions = [phi for phi in bank.phis if isinstance(phi, Phi)]
    if not convolutions:
        C, P = like.shape[1], len(bank.phis)
        return like.new_zeros(P, C, C, 3, 3), like.new_zeros(P, C)
    weights, biases = [phi.weight for phi in convolutions], [phi.bias for phi in convolutions]
    if len(convolutions) == 1:
        return weights[0][None], _present(biases[0])[None]
    return torch.stack(weights), torch.stack([_present(bias) for bias in biases])


def _present(bias: Tensor | None) -> Tensor:
    assert bias is not None  # a Phi always has one
    return bias
