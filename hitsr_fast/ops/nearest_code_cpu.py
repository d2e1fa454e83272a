"""CPU backend of `nearest_code`: csrc/cpu/nearest_code*.cpp, on the best instruction set of the machine."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hitsr_fast import env, extension
from hitsr_fast.ops.nearest_code_inputs import as_maps, unsupported


def available() -> str | None:
    """Why nothing can run on this machine, or None."""
    return extension.unavailable()


def supports(x: Tensor, codebook: Tensor, parts: list[Tensor], layout: str, metric: str) -> str | None:
    """Why a call with such arguments cannot run here, or None."""
    return unsupported(x, codebook, "cpu")


def instruction_sets() -> list[str]:
    """Those that the extension has code for and this machine can run, quickest first.

    Raises:
        RuntimeError: the extension is unavailable; the message says why.
    """
    reason = extension.unavailable()
    if reason is not None:
        raise RuntimeError(f"hitsr_fast._C: {reason}")
    return list(_instruction_sets())


@functools.cache
def _instruction_sets() -> tuple[str, ...]:
    return tuple(torch.ops.hitsr_fast._nearest_code_isas())


def full_scans() -> int:
    """Rows, since the process began, that the screen could not decide and that were searched in full.

    Raises:
        RuntimeError: the extension is unavailable; the message says why.
    """
    instruction_sets()
    count: int = torch.ops.hitsr_fast._nearest_code_full_scans()
    return count


def chosen_isa() -> str:
    """The instruction set that HITSR_FAST_CPU_ISA asks for, or the quickest.

    Raises:
        ValueError: this machine does not have it.
    """
    names = instruction_sets()
    wanted = env.cpu_isa()
    if wanted is not None and wanted not in names:
        raise ValueError(f"HITSR_FAST_CPU_ISA: expected one of {', '.join(names)}, found {wanted!r}")
    return wanted or names[0]


def can_prepare(codebook: Tensor) -> bool:
    """Whether this backend has a packed form for such a codebook."""
    rows = codebook.new_empty(0)
    return available() is None and supports(rows, codebook, [], "", "l2") is None


def prepare(codebook: Tensor, metric: str) -> tuple[str, tuple[Tensor, ...]]:
    """Name of the layout and the packed form of a codebook, `(K, C)` or `(G, K, C)`."""
    isa = chosen_isa()
    groups = codebook if codebook.dim() == 3 else codebook[None]
    return f"cpu:{isa}", tuple(torch.ops.hitsr_fast._nearest_code_pack(groups, metric == "cosine", isa))


def nearest_code_cpu(x: Tensor, codebook: Tensor, parts: list[Tensor], layout: str, metric: str) -> Tensor:
    """As `reference.nearest_code`, and for maps."""
    packed: Sequence[Tensor] = parts
    if not layout.startswith("cpu:"):
        layout, packed = prepare(codebook, metric)
    maps, shape = as_maps(x)
    cosine, codes = metric == "cosine", codebook.shape[-2]
    isa = layout.removeprefix("cpu:")
    indices: Tensor = torch.ops.hitsr_fast._nearest_code_search(maps, list(packed), codes, cosine, isa)
    return indices.view(shape)
