"""CPU backend of `residual_quantize`: the definition's loop on the compiled codebook search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

import hitsr_fast.reference.residual_quantize as reference
from hitsr_fast.ops import nearest_code_cpu


def supports(z: Tensor, codebook: Tensor, *_rest: Any) -> str | None:
    """Why a call with such arguments cannot run here, or None."""
    rows = z.new_empty(0, dtype=reference.arithmetic_dtype(codebook))
    return nearest_code_cpu.supports(rows, codebook, [], "", "l2")


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
    """As `reference.residual_quantize`; the codebook is packed once for all scales."""
    if not layout.startswith("cpu:"):
        layout, parts = nearest_code_cpu.prepare(codebook, metric)

    def search(rows: Tensor, codes: Tensor, metric: str) -> Tensor:
        return nearest_code_cpu.nearest_code_cpu(rows, codes, list(parts), layout, metric)

    return reference.residual_quantize(
        z,
        codebook,
        phi_weight,
        phi_bias,
        scales,
        phi_index,
        phi_ratio,
        replay,
        metric,
        inputs,
        per_scale,
        search=search,
    )
