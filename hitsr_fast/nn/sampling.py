"""Drawing codes from logits."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_codes(
    logits: Tensor, *, top_k: int = 1, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one code a row, greedily by default.

    Args:
        logits: `(..., K)` floating.
        top_k: Keep the k largest logits; 1 is greedy (the lowest index on ties), 0 keeps all.
        top_p: Then keep the smallest set of codes whose probability reaches `top_p`; the largest always
            stays.
        generator: Source of randomness on the logits' device; unused when greedy.

    Returns:
        `(...)` int64.

    Raises:
        ValueError: If `top_k` is negative or `top_p` is not in (0, 1].

    Source: VAR, `sample_with_top_k_top_p_`.
    """
    if top_k < 0:
        raise ValueError(f"top_k: expected at least 0, got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected a value in (0, 1], got {top_p}")
    if top_k == 1:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1.0 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    flat = logits.softmax(-1).flatten(0, -2)
    return torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1])
