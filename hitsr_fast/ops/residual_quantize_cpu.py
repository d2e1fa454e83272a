"""CPU backend of the residual quantizer: csrc/cpu/residual_quantize*.cpp, on the best instruction set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hitsr_fast.ops import nearest_code_cpu
from hitsr_fast.ops.nearest_code_inputs import unsupported

_LIBRARY = torch.ops.hitsr_fast


def supports(z: Tensor, codebook: Tensor, *_rest: Any) -> str | None:
    """Why a call of `residual_quantize` with such arguments cannot run here, or None."""
    if z.device.type != "cpu":
        return f"needs CPU tensors, found z on {z.device.type}"
    return unsupported(codebook, codebook, "cpu")


def supports_decode(indices: Tensor, codebook: Tensor, *_rest: Any) -> str | None:
    """The same of `residual_decode`."""
    return unsupported(codebook, codebook, "cpu")


def supports_step(reconstruction: Tensor, indices: Tensor, codebook: Tensor, *_rest: Any) -> str | None:
    """The same of `residual_step`."""
    return unsupported(codebook, codebook, "cpu")


def residual_quantize_cpu(
    z: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    phi_bias: Tensor,
    parts: Sequence[Tensor],
    layout: str,
    scales: Sequence[int],
    phi_index: Sequence[int],
    phi_ratio: float,
    replay: Tensor | None,
    metric: str,
    inputs: bool,
    per_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.residual_quantize`."""
    if not layout.startswith("cpu:"):
        layout, parts = nearest_code_cpu.prepare(codebook, metric)
    bank, isa = (codebook, phi_weight, phi_bias, parts), layout.removeprefix("cpu:")
    cosine, z = metric == "cosine", z.float() if z.dtype == torch.float64 else z
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _LIBRARY._residual_quantize(
        z, *bank, scales, phi_index, phi_ratio, replay, cosine, inputs, per_scale, isa
    )
    return out


def residual_decode_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.residual_decode`."""
    out: tuple[Tensor, Tensor, Tensor] = _LIBRARY._residual_decode(*args, nearest_code_cpu.chosen_isa())
    return out


def residual_step_cpu(*args: Any) -> Tensor:
    """As `reference.residual_step`."""
    pooled: Tensor = _LIBRARY._residual_step(*args, nearest_code_cpu.chosen_isa())
    return pooled
