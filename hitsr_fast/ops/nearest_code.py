"""`nearest_code`: exact batched codebook search."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from hitsr_fast.dispatch import Backend, register
from hitsr_fast.ops.validation import FLOATING, check_choice, check_finite, check_shape, check_tensor
from hitsr_fast.reference.nearest_code import nearest_code as nearest_code_reference

Metric = Literal["l2", "cosine"]


def nearest_code(x: Tensor, codebook: Tensor, *, metric: Metric = "l2") -> Tensor:
    """Index of the code nearest to each row: `argmin_k |x - e_k|^2`, exactly.

    Args:
        x: float16, bfloat16, float32 or float64, `(N, C)` or `(G, N, C)`; N may be 0. Any strides.
        codebook: of the same dtypes, `(K, C)` or `(G, K, C)`; finite, K at least 1.
        metric: "l2", or "cosine" for `argmax_k x.e_k / |e_k|` (a zero code scores 0).

    Returns:
        int64 `(N,)` or `(G, N)`.

    Raises:
        TypeError: an argument is not a tensor of those dtypes.
        ValueError: shapes or devices do not fit, K = 0, unknown metric, NaN or infinity in the codebook.

    Notes:
        Ties: the lowest index. A row that holds NaN or infinity gives 0 and leaves the other rows alone.
        Accumulation: float64 on the given values, channel by channel, so the indices are the same
        on every backend, whatever its threads or batch split.
        Gradient: none (the result is integer).
        Backends: reference.
        Source: the codebook search of VQ-VAE (arXiv 1711.00937), equation 1.

    Example:
        >>> x = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
        >>> codebook = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> nearest_code(x, codebook)
        tensor([1, 0])
    """
    check_tensor("x", x, FLOATING)
    check_tensor("codebook", codebook, FLOATING, like=x)
    if x.dim() == 3:
        check_shape("codebook", codebook, "G K C", G=x.shape[0], C=x.shape[2])
    else:
        check_shape("x", x, "N C")
        check_shape("codebook", codebook, "K C", C=x.shape[1])
    if codebook.shape[-2] == 0 or codebook.shape[-1] == 0:
        raise ValueError(f"codebook: expected K and C of at least 1, found shape {tuple(codebook.shape)}")
    check_choice("metric", metric, get_args(Metric))
    indices: Tensor = torch.ops.hitsr_fast.nearest_code(x, codebook, metric)
    return indices


def _check(x: Tensor, codebook: Tensor, metric: str) -> None:
    check_finite("codebook", codebook)


def _fake(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


register(
    "nearest_code(Tensor x, Tensor codebook, str metric) -> Tensor",
    backends=[Backend("reference", nearest_code_reference)],
    fake=_fake,
    check=_check,
)
