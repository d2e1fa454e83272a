"""Modules on the ops."""

from hitsr_fast.nn.residual_quantizer import ResidualQuantizer, TrainedQuantization

__all__ = ["ResidualQuantizer", "TrainedQuantization"]
