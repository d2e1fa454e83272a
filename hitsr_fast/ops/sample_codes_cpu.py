"""CPU backend of `sample_codes`: csrc/cpu/sample_codes*.cpp, on the best instruction set of the machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hitsr_fast.ops.nearest_code_cpu import available, chosen_isa
from hitsr_fast.reference.sample_codes import dropped_fraction, power_scale

__all__ = ["available", "sample_codes_cpu", "supports"]


def supports(logits: Tensor, *_rest: Any) -> str | None:
    """Why a call with such arguments cannot run here, or None."""
    return None if logits.device.type == "cpu" else f"needs CPU tensors, found {logits.device.type}"


def sample_codes_cpu(
    logits: Tensor,
    uncond_logits: Tensor | None,
    state: Tensor | None,
    guidance: float,
    top_k: int,
    top_p: float,
    temperature: float,
) -> Tensor:
    """As `reference.sample_codes`."""
    codes: Tensor = torch.ops.hitsr_fast._sample_codes(
        _rows(logits),
        None if uncond_logits is None else _rows(uncond_logits),
        state,
        guidance,
        top_k,
        dropped_fraction(top_p) if 0 < top_p < 1 else -1,
        power_scale(temperature),
        chosen_isa(),
    )
    return codes.view(logits.shape[:-1])


def _rows(logits: Tensor) -> Tensor:
    """float32 `(N, V)`, contiguous."""
    return logits.float().reshape(-1, logits.shape[-1]).contiguous()
