"""A prepared codebook that follows the parameter it was made of."""

from __future__ import annotations

import torch
from torch import Tensor

from hitsr_fast.checks import has_values
from hitsr_fast.nn.versions import Snapshot
from hitsr_fast.ops import Metric, PreparedCodebook, prepare_codebook
from hitsr_fast.ops.nearest_code import is_current


class CodebookCache:
    """Packs a codebook when it is first needed, and again after it has changed.

    A module holds one beside its codebook. It is no part of the state dict, and copies and pickles of the
    module start with an empty one.

    On the CPU a change is found by comparing values, which takes a fraction of the search's time and sees all
    ways of writing. On other devices a comparison would stall the caller, so memory address and version
    counter decide: they see optimizers, `load_state_dict`, `.to()` and all writes through PyTorch, but not
    writes in place to `.data`.

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
        self._entry: tuple[PreparedCodebook, Snapshot] | None = None

    def __call__(self, codebook: Tensor, *, metric: Metric = "l2") -> PreparedCodebook | None:
        """Of a codebook `(K, C)`; None, which leaves packing to each call, where nothing may be kept.

        That is while a tracer is at work, and, off the CPU, of inference tensors, which count no versions.
        """
        if not has_values(codebook) or (codebook.is_inference() and codebook.device.type != "cpu"):
            return None
        entry = self._entry
        if (
            entry is None
            or entry[0].metric != metric
            or not is_current(entry[0])
            or _changed(codebook, *entry)
        ):
            entry = self._entry = prepare_codebook(codebook.detach(), metric=metric), Snapshot(codebook)
        return entry[0]

    def __getstate__(self) -> dict[str, None]:
        return {"_entry": None}


def _changed(codebook: Tensor, prepared: PreparedCodebook, source: Snapshot) -> bool:
    known = prepared.codebook
    if codebook.device.type == "cpu" and (codebook.dtype, codebook.device) == (known.dtype, known.device):
        return not torch.equal(codebook, known)
    return not source.is_of(codebook)
