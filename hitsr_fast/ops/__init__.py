"""The public ops: each checks its arguments and calls `torch.ops.hitsr_fast.<op>`, which picks a backend."""

from hitsr_fast.backends import active_instruction_set, instruction_sets, use_instruction_set
from hitsr_fast.ops.attention_prologue import attention_prologue
from hitsr_fast.ops.group_norm_silu import group_norm_silu
from hitsr_fast.ops.modulated_layer_norm import gated_residual, gated_residual_norm, modulated_layer_norm
from hitsr_fast.ops.nearest_code import Metric, PreparedCodebook, nearest_code, prepare_codebook
from hitsr_fast.ops.preference_cross_entropy import preference_cross_entropy
from hitsr_fast.ops.residual_quantize import (
    ResidualDecoded,
    ResidualQuantized,
    TokenizedPyramid,
    residual_decode,
    residual_quantize,
    residual_step,
    tokenize_pyramid,
)
from hitsr_fast.ops.sample_codes import sample_codes
from hitsr_fast.ops.scale_block_attention import cached_attention, scale_block_attention
from hitsr_fast.reference.residual_quantize import nearest_phi, phi_table

__all__ = [
    "Metric",
    "PreparedCodebook",
    "ResidualDecoded",
    "ResidualQuantized",
    "TokenizedPyramid",
    "active_instruction_set",
    "attention_prologue",
    "cached_attention",
    "gated_residual",
    "gated_residual_norm",
    "group_norm_silu",
    "instruction_sets",
    "modulated_layer_norm",
    "nearest_code",
    "nearest_phi",
    "phi_table",
    "preference_cross_entropy",
    "prepare_codebook",
    "residual_decode",
    "residual_quantize",
    "residual_step",
    "sample_codes",
    "scale_block_attention",
    "tokenize_pyramid",
    "use_instruction_set",
]
