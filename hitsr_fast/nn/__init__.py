"""Modules on the ops."""

from hitsr_fast.nn.bank import QuantizerBank, ReconstructionWalk
from hitsr_fast.nn.quantizer import ResidualQuantizer, TrainedQuantization

__all__ = ["QuantizerBank", "ReconstructionWalk", "ResidualQuantizer", "TrainedQuantization"]
