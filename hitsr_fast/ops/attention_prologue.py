"""`attention_prologue`: what lies between an attention's qkv product and its scores, cache write included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hitsr_fast.reference.attention_prologue as reference
from hitsr_fast.backends import UP_TO_FLOAT32, Launch, Native
from hitsr_fast.checks import (
    FLOATING,
    check_apart,
    check_integer,
    check_own_memory,
    check_shape,
    check_tensor,
)
from hitsr_fast.dispatch import op
from hitsr_fast.ops import attention_prologue_triton as triton

_FLOAT32 = (torch.float32,)


def attention_prologue(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    *,
    bias: Tensor | None = None,
    q_scale: Tensor | None = None,
    rotary: Tensor | None = None,
) -> Tensor:
    """Queries of a block of tokens from its qkv product; its keys and values go into the caches.

    With `q, k, v = split(qkv + bias)`, for each head: `q = q_scale * q / |q|` and `k = k / |k|`; then each
    pair `(x0, x1)` of neighbours in q and k becomes `(x0 cos - x1 sin, x0 sin + x1 cos)`; then
    `k_cache[:, start:end] = k` and `v_cache[:, start:end] = v` with `end = start + L`. A step whose argument
    is not given is left out.

    Args:
        qkv: float16, bfloat16, float32 or float64, `(B, L, 3 * NH * D)`: q, k and v, each NH heads of D. Any
            strides.
        k_cache: of those dtypes, not necessarily that of qkv, `(B, Tmax, NH, D)`; changed in place.
        v_cache: of the dtype and shape of k_cache; changed in place. The caches share no memory with each
            other nor with another argument.
        start: number of tokens already in the caches.
        bias: of those dtypes, `(3 * NH * D,)`.
        q_scale: float32 `(NH,)`. With it q and k are brought to length one (below 1e-12, they are multiplied
            by 1e12), as `torch.nn.functional.normalize` does.
        rotary: float32 `(L, D / 2, 2)`, cosine and sine for each token and pair.

    Returns:
        q: `(B, L, NH, D)` in the dtype of qkv.

    Raises:
        TypeError: an argument is not a tensor of those dtypes, or `start` not an integer.
        ValueError: a shape or device does not fit, D is odd with `rotary`, the block does not fit into the
            caches, or memory is shared.
        RuntimeError: an argument asks for a gradient; the prologue has none.

    Notes:
        Computed in float32 (float64 for float64 qkv) and rounded once, to q's dtype and to the caches'.
        Backends: triton, cpu (both all dtypes but float64; one launch), reference.
        Source: attention with l2-normalised queries and keys of VAR (arXiv 2404.02905); the rotary embedding
        of Switti (arXiv 2412.01819), whose table `hitsr_fast.nn.rotary.axial_rotary` makes.

    Example:
        >>> k_cache, v_cache = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
        >>> qkv = torch.tensor([[[3.0, 4.0, 0.0, 2.0, 5.0, 6.0]]])
        >>> attention_prologue(qkv, k_cache, v_cache, 1, q_scale=torch.tensor([10.0])).flatten()
        tensor([6., 8.])
        >>> k_cache.flatten(), v_cache.flatten()
        (tensor([0., 0., 0., 1.]), tensor([0., 0., 5., 6.]))
    """
    check_tensor("qkv", qkv, FLOATING)
    check_shape("qkv", qkv, "B L 3*NH*D")
    check_tensor("k_cache", k_cache, FLOATING, like=qkv)
    check_shape("k_cache", k_cache, "B Tmax NH D", B=qkv.shape[0])
    check_tensor("v_cache", v_cache, (k_cache.dtype,), like=qkv)
    B, Tmax, NH, D = k_cache.shape
    if v_cache.shape != k_cache.shape:
        check_shape("v_cache", v_cache, "B Tmax NH D", B=B, Tmax=Tmax, NH=NH, D=D)
    _, L, width = qkv.shape
    if width != 3 * NH * D:
        raise ValueError(f"qkv: expected shape (B={B}, L, 3*NH*D={3 * NH * D}), found {tuple(qkv.shape)}")
    if Tmax < L:
        raise ValueError(f"qkv: expected L of at most Tmax = {Tmax}, found {L}")
    check_integer("start", start, 0, Tmax - L, "Tmax - L")
    if bias is not None:
        check_tensor("bias", bias, FLOATING, like=qkv)
        check_shape("bias", bias, "3*NH*D", **{"3*NH*D": width})
    if q_scale is not None:
        check_tensor("q_scale", q_scale, _FLOAT32, like=qkv)
        check_shape("q_scale", q_scale, "NH", NH=NH)
    if rotary is not None:
        check_tensor("rotary", rotary, _FLOAT32, like=qkv)
        if D % 2 != 0:
            raise ValueError(f"rotary: expected caches of an even D, found {D}")
        check_shape("rotary", rotary, "L D/2 2", **{"L": L, "D/2": D // 2, "2": 2})
    q: Tensor = _prologue(qkv, k_cache, v_cache, start, bias, q_scale, rotary)
    return q


def _check(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, start: int, *given: Tensor | None) -> None:
    bias, q_scale, rotary = given
    check_own_memory("k_cache", k_cache)
    check_own_memory("v_cache", v_cache)
    read = {"qkv": qkv, "bias": bias, "q_scale": q_scale, "rotary": rotary}
    check_apart({"k_cache": k_cache, "v_cache": v_cache}, read)


def _dense_heads(qkv: Tensor, *caches_and_rest: Any) -> str | None:
    for cache in caches_and_rest[:2]:
        if cache.shape[3] > 1 and cache.stride(3) != 1:
            return f"needs caches with a stride of 1 over D, found {cache.stride(3)}"
    return None


@op(
    "attention_prologue(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, SymInt start, Tensor? bias, "
    "Tensor? q_scale, Tensor? rotary) -> Tensor",
    reference=reference.attention_prologue,
    triton=Launch(triton.attention_prologue_triton, limits=triton.LIMITS),
    native=Native("_attention_prologue", dtypes=UP_TO_FLOAT32, unless=_dense_heads),
    check=_check,
)
def _prologue(qkv: Tensor, k_cache: Tensor, *_rest: Any) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], *k_cache.shape[2:]))
