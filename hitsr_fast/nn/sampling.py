"""Drawing codes from logits, greedily by default."""

from __future__ import annotations

import torch
from torch import Tensor

from hitsr_fast import ops


def sample_codes(
    logits: Tensor,
    *,
    uncond_logits: Tensor | None = None,
    guidance: float = 0.0,
    top_k: int = 1,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`ops.sample_codes` with the defaults of a sampler of images: the most likely code of each row.

    Args:
        logits: float16, bfloat16 or float32 `(..., K)`.
        uncond_logits: The same without the condition, for `guidance` above 0.
        guidance: See `ops.sample_codes`.
        top_k: Keep the k largest logits; 1 is greedy (the lowest index on ties), 0 keeps all.
        top_p: Then keep the smallest set of codes whose probability reaches `top_p`; the largest always
            stays.
        generator: Source of randomness; unused when greedy.

    Returns:
        `(...)` int64.

    Raises:
        ValueError: If `top_k` is negative or `top_p` is not in (0, 1].
    """
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected a value in (0, 1], got {top_p}")
    return ops.sample_codes(
        logits, uncond_logits=uncond_logits, guidance=guidance, top_k=top_k, top_p=top_p, generator=generator
    )
