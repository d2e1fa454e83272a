"""Steps whose loss or gradient is not finite: found, skipped and counted on the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

IN_A_ROW = 10
"""Skipped steps after which a run stops."""

_FIRST_SCALE, _LARGEST_SCALE = 2.0**16, 2.0**24
_GROW_AFTER = 2000  # steps without one that is skipped


class Guard:
    """Counts of skipped steps, and for float16 the factor of the loss, which they halve.

    Args:
        device: Of the counts.
        scaled: Whether the loss has a factor. A gradient that is not finite under one above 1 is what the
            factor is found by: such a step is skipped and counted, but is none of ten in a row unless the
            loss itself is not finite.
    """

    def __init__(self, device: torch.device, *, scaled: bool) -> None:
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # all, in a row, the tenth in a row
        self.scale = torch.full((), _FIRST_SCALE, device=device) if scaled else None
        self._finite_steps = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def check(self, step: int, loss: Tensor, norms: Iterable[Tensor]) -> Tensor:
        """Take note of a step, counted from 0; a float32 scalar, 1 where it is to be skipped, else 0."""
        bad_loss = ~loss.isfinite()
        bad = bad_loss | ~torch.stack(list(norms)).isfinite().all()
        counted = bad if self.scale is None else bad_loss | (bad & (self.scale <= 1.0))
        total, in_a_row, tenth = self._counts.unbind()
        total += bad
        # A step that only searches the scale neither counts nor breaks a row.
        in_a_row.copy_(torch.where(bad, in_a_row + counted, 0))
        tenth.copy_(torch.where((in_a_row >= IN_A_ROW) & (tenth == 0), step + 1, tenth))
        if self.scale is not None:
            self._finite_steps.copy_(torch.where(bad, 0, self._finite_steps + 1))
            grow = self._finite_steps >= _GROW_AFTER
            self._finite_steps.masked_fill_(grow, 0)
            moved = torch.where(bad, self.scale * 0.5, torch.where(grow, self.scale * 2.0, self.scale))
            self.scale.copy_(moved.clamp(1.0, _LARGEST_SCALE))
        return bad.float()

    def read(self) -> tuple[int, int]:
        """Steps skipped so far, and the number, from 1, of the tenth in a row, or 0; waits for the device."""
        total, _, tenth = self._counts.tolist()
        return total, tenth

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by names."""
        scale = {} if self.scale is None else {"scale": self.scale, "finite_steps": self._finite_steps}
        return {"skipped": self._counts, **scale}
