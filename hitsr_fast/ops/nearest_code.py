"""`nearest_code`: exact batched codebook search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hitsr_fast.backends import UP_TO_FLOAT32, Launch, Native, active_instruction_set
from hitsr_fast.checks import FLOATING, check_choice, check_finite, check_shape, check_tensor
from hitsr_fast.dispatch import op
from hitsr_fast.ops import nearest_code_triton as triton
from hitsr_fast.ops.packed_codebook import pack_triton
from hitsr_fast.reference.nearest_code import nearest_code as reference

Metric = Literal["l2", "cosine"]
METRICS = get_args(Metric)


@dataclass(frozen=True)
class PreparedCodebook:
    """A codebook that was checked and packed once, to be searched many times; see `prepare_codebook`."""

    codebook: Tensor  # (K, C) or (G, K, C), a copy of what was packed
    metric: Metric  # that it was packed for
    layout: str  # what `parts` are made for; "" if no backend has a packed form for such a codebook
    parts: tuple[Tensor, ...]  # the packed form


def prepare_codebook(codebook: Tensor, *, metric: Metric = "l2") -> PreparedCodebook:
    """Check and pack a codebook (centred, rounded, with norms and error bounds) for repeated searches.

    Arguments and errors are those of `nearest_code`. The values are looked at once, which on a GPU waits for
    it; searches of the result wait for nothing. It is a copy: later writes to the codebook do not reach it.

    Returns:
        What `nearest_code` takes in place of the codebook.

    Example:
        >>> prepared = prepare_codebook(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> nearest_code(torch.tensor([[0.9, 0.1]]), prepared)
        tensor([1])
    """
    check_tensor("codebook", codebook, FLOATING)
    if codebook.dim() not in (2, 3):
        raise ValueError(f"codebook: expected shape (K, C) or (G, K, C), found {tuple(codebook.shape)}")
    check_not_empty(codebook)
    check_choice("metric", metric, METRICS)
    check_finite("codebook", codebook)
    codes = codebook.detach().clone()
    for name, pack in (("triton", pack_triton), ("cpu", pack_cpu)):
        if _nearest_code.backends[name].reason(codes.new_empty(0), codes) is None:
            return PreparedCodebook(codes, metric, *pack(codes, metric))
    return PreparedCodebook(codes, metric, "", ())


def nearest_code(x: Tensor, codebook: Tensor | PreparedCodebook, *, metric: Metric = "l2") -> Tensor:
    """Index of the code nearest to each row: `argmin_k |x - e_k|^2`, exactly.

    Args:
        x: float16, bfloat16, float32 or float64, `(N, C)`, `(G, N, C)`, or a map `(B, C, H, W)`, whose
            rows are its positions; N may be 0. Any strides.
        codebook: of the same dtypes, `(K, C)` or `(G, K, C)`; finite, K at least 1. Or what
            `prepare_codebook` made of it.
        metric: "l2", or "cosine" for `argmax_k x.e_k / |e_k|` (a zero code scores 0).

    Returns:
        int64 `(N,)`, `(G, N)` or `(B, H, W)`.

    Raises:
        TypeError: an argument is not a tensor of those dtypes.
        ValueError: shapes, devices or metrics do not fit, K = 0; on the CPU, NaN or infinity in the codebook.

    Notes:
        Ties: the lowest index. A row that holds NaN or infinity gives 0 and leaves the other rows alone.
        On a GPU no value is read back: there a codebook with NaN or infinity gives indices from 0 to K - 1
        that mean nothing. `prepare_codebook` raises on every device.
        Accumulation: float64 on the given values, channel by channel, so the indices are the same
        on every backend, whatever its threads or batch split. What is quicker only screens, within a proven
        bound (docs/ops/nearest_code.md).
        Gradient: none (the result is integer).
        Backends: triton, cpu (both all dtypes but float64, C up to 256), reference.
        Source: the codebook search of VQ-VAE (arXiv 1711.00937), equation 1.

    Example:
        >>> x = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
        >>> codebook = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> nearest_code(x, codebook)
        tensor([1, 0])
    """
    check_tensor("x", x, FLOATING)
    prepared = codebook if isinstance(codebook, PreparedCodebook) else None
    codes = prepared.codebook if prepared else codebook
    check_tensor("codebook", codes, FLOATING, like=x)
    assert isinstance(codes, Tensor)
    if x.dim() == 3:
        check_shape("codebook", codes, "G K C", G=x.shape[0], C=x.shape[2])
    elif x.dim() == 4:
        check_shape("codebook", codes, "K C", C=x.shape[1])
    else:
        check_shape("x", x, "N C")
        check_shape("codebook", codes, "K C", C=x.shape[1])
    check_not_empty(codes)
    check_choice("metric", metric, METRICS)
    if prepared and prepared.metric != metric:
        raise ValueError(
            f"metric: expected {prepared.metric}, for which the codebook was prepared, found {metric}"
        )
    layout, parts = (prepared.layout, list(prepared.parts)) if prepared else ("", [])
    indices: Tensor = _nearest_code(x, codes, parts, layout, metric)
    return indices


def check_not_empty(codebook: Tensor) -> None:
    """Raise ValueError unless there are codes, of one channel at least."""
    if 0 in codebook.shape[-2:]:
        raise ValueError(f"codebook: expected K and C of at least 1, found shape {tuple(codebook.shape)}")


def check_codebook(codebook: Tensor, layout: str) -> None:
    """Raise ValueError if a codebook is not finite. CPU only: elsewhere a look stalls the device."""
    if not layout and codebook.device.type == "cpu":  # what is packed was looked at by `prepare_codebook`
        check_finite("codebook", codebook)


def _check(x: Tensor, codebook: Tensor, parts: list[Tensor], layout: str, metric: str) -> None:
    check_codebook(codebook, layout)


def _reference(x: Tensor, codebook: Tensor, parts: list[Tensor], layout: str, metric: str) -> Tensor:
    if x.dim() == 4:
        rows = x.movedim(1, -1)
        return reference(rows.reshape(-1, x.shape[1]), codebook, metric).view(rows.shape[:-1])
    return reference(x, codebook, metric)


def is_current(prepared: PreparedCodebook) -> bool:
    """Whether a codebook, if it is packed for the CPU, is so for the active instruction set."""
    return not prepared.layout.startswith("cpu:") or prepared.layout == f"cpu:{active_instruction_set()}"


def packed_cpu(
    codebook: Tensor, parts: Sequence[Tensor], layout: str, metric: str
) -> tuple[str, Sequence[Tensor]]:
    """Instruction set and packed form: the given ones, or anew where those are of another layout."""
    isa = active_instruction_set()
    return (isa, parts) if layout == f"cpu:{isa}" else (isa, pack_cpu(codebook, metric)[1])


def pack_cpu(codebook: Tensor, metric: str) -> tuple[str, tuple[Tensor, ...]]:
    """Name of the layout and the packed form of a codebook, `(K, C)` or `(G, K, C)`, for the CPU."""
    isa = active_instruction_set()
    groups = codebook if codebook.dim() == 3 else codebook[None]
    return f"cpu:{isa}", tuple(torch.ops.hitsr_fast._nearest_code_pack(groups, metric == "cosine", isa))


def _cpu(x: Tensor, codebook: Tensor, parts: Sequence[Tensor], layout: str, metric: str) -> Tensor:
    isa, parts = packed_cpu(codebook, parts, layout, metric)
    maps, shape = triton.as_maps(x)
    options = list(parts), codebook.shape[-2], metric == "cosine", isa
    indices: Tensor = torch.ops.hitsr_fast._nearest_code_search(maps, *options)
    return indices.view(shape)


@op(
    "nearest_code(Tensor x, Tensor codebook, Tensor[] parts, str layout, str metric) -> Tensor",
    reference=_reference,
    triton=Launch(triton.nearest_code_triton, limits=triton.LIMITS, unless=triton.too_many_groups),
    native=Native("_nearest_code_search", run=_cpu, dtypes=UP_TO_FLOAT32, limits=triton.LIMITS),
    check=_check,
    integer=True,
)
def _nearest_code(x: Tensor, codebook: Tensor, parts: list[Tensor], layout: str, metric: str) -> Tensor:
    shape = (x.shape[0], *x.shape[2:]) if x.dim() == 4 else x.shape[:-1]
    return x.new_empty(shape, dtype=torch.int64)
