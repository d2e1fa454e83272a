"""CUDA C++ backend of `residual_quantize`: csrc/cuda/residual_quantize.cu, all scales of an image in one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hitsr_fast import extension
from hitsr_fast.ops import nearest_code_triton as packing

CODEBOOK_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CHANNELS = (8, 16, 32, 64)
MAX_SCALES = 32


def pack_phi(phi_weight: Tensor) -> Tensor:
    """`(P, C, C, 3, 3)` as float32 `(P, 9, C / 4, C, 4)`: of a tap, four inputs of each output channel."""
    P, C = phi_weight.shape[:2]
    by_tap = phi_weight.float().permute(0, 3, 4, 2, 1).reshape(P, 9, C // 4, 4, C)
    return by_tap.transpose(3, 4).contiguous()
