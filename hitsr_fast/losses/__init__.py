"""Training losses."""

from hitsr_fast.losses.reconstruction import ReconstructionLoss, ReconstructionLossConfig

__all__ = ["ReconstructionLoss", "ReconstructionLossConfig"]
