"""Triton backend of `sample_codes`: launches the kernel of kernels/sample_codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hitsr_fast.backends import Limit
from hitsr_fast.reference.sample_codes import dropped_fraction, power_scale, split

LIMITS = (Limit("V", -1, 16384),)  # a row lies in one program's registers
_PER_THREAD = 16  # codes

# The definition multiplies and adds in two steps.
_OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}


def constants(codes: int) -> dict[str, int]:
    """Block sizes and warps for rows of so many codes."""
    bits = max((codes - 1).bit_length(), 5)
    warps = min(max(2**bits // (32 * _PER_THREAD), 1), 16)
    return {"BLOCK": 2**bits, "BITS": bits, "num_warps": warps}


def sample_codes_triton(*args: Any) -> Tensor:
    """As `reference.sample_codes`."""
    from hitsr_fast.kernels.sample_codes import _sample_codes_kernel

    logits, uncond_logits, state, guidance, top_k, top_p, temperature, settings = args
    V = logits.shape[-1]
    x = logits.reshape(-1, V)
    other = x if uncond_logits is None else uncond_logits.reshape(-1, V)
    codes = torch.empty(len(x), dtype=torch.int64, device=x.device)
    words = [codes if tensor is None else tensor.contiguous() for tensor in (state, settings)]
    if len(x) > 0:
        _sample_codes_kernel[(len(x),)](
            x, other, *words, codes, x.stride(), other.stride(), V,
            1 + guidance, guidance, power_scale(temperature), min(top_k, V), *split(dropped_fraction(top_p)),
            GUIDED=uncond_logits is not None, GREEDY=state is None, SETTINGS=settings is not None,
            **constants(V), **_OPTIONS,
        )  # fmt: skip
    return codes.view(logits.shape[:-1])
