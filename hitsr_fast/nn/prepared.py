"""A prepared codebook that follows the parameter it was made of."""

from __future__ import annotations

import torch
from torch import Tensor

from hitsr_fast.checks import has_values
from hitsr_fast.ops import Metric, PreparedCodebook, prepare_codebook
from hitsr_fast.ops.nearest_code import is_current


class CodebookCache:
    """Packs a codebook on the CPU when it is first needed, and again after it has changed.

    A module holds one beside its codebook. It is no part of the state dict, and copies and pickles of the
    module start with an empty one.

    A change is found by comparing values, which takes a fraction of the search's time and sees all ways of
    writing. On other devices nothing is kept: a comparison would stall the caller, and PyTorch's version
    counters miss collectives, FSDP2, replayed graphs and writes to `.data`. There packing is part of the op:
    two small kernels a call (docs/ops/nearest_code.md).

    Example:
        >>> cache, codebook = CodebookCache(), torch.randn(16, 4)
        >>> prepared = cache(codebook)
        >>> cache(codebook) is prepared
        True
        >>> codebook += 1
        >>> cache(codebook) is prepared
        False
    """

    def __init__(self) -> None:
        self._entry: PreparedCodebook | None = None

    def __call__(self, codebook: Tensor, *, metric: Metric = "l2") -> PreparedCodebook | None:
        """Of a codebook `(K, C)`; None, which leaves packing to each call, off the CPU and while tracing."""
        if not keeps(codebook):
            return None
        entry = self._entry
        if (
            entry is None
            or entry.metric != metric
            or not is_current(entry)
            or entry.codebook.dtype != codebook.dtype
            or not torch.equal(codebook, entry.codebook)
        ):
            entry = self._entry = prepare_codebook(codebook.detach(), metric=metric)
        return entry

    def __getstate__(self) -> dict[str, None]:
        return {"_entry": None}


def keeps(codebook: Tensor) -> bool:
    """Whether a codebook's packed form may be kept: where comparing values waits for no device."""
    return codebook.device.type == "cpu" and has_values(codebook)
