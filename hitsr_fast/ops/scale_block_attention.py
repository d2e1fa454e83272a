"""`scale_block_attention` and `cached_attention`: next-scale attention for training and for sampling."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal, overload

import torch
from torch import Tensor

import hitsr_fast.reference.scale_block_attention as reference
from hitsr_fast.backends import UP_TO_FLOAT32, Flash, FlashVersion, Launch, Native, native
from hitsr_fast.checks import FLOATING, INTEGER, check_integer, check_number, check_shape, check_tensor
from hitsr_fast.dispatch import Gradient, op
from hitsr_fast.ops import scale_block_attention_triton as triton


@overload
def scale_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_lengths: Sequence[int],
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def scale_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_lengths: Sequence[int],
    softmax_scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def scale_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_lengths: Sequence[int],
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which a token sees its own block and all earlier ones, whole.

    For block i, which ends at token e_i: `out_i = softmax(softmax_scale * q_i k[:e_i]^T) v[:e_i]`.

    Args:
        q: float16, bfloat16, float32 or float64, `(B, T, NH, D)`. Any strides.
        k, v: of the same dtype and shape.
        block_lengths: lengths of the blocks in order, each at least 1, summing to T; block 0 is the prefix
            with the first scale.
        softmax_scale: factor of the scores; None means `1 / sqrt(D)`.
        return_lse: return lse too.

    Returns:
        out: `(B, T, NH, D)` in the dtype of q.
        lse: where asked for, `(B, NH, T)`, the logarithm of each softmax's denominator, float32 (float64 for
            float64). No gradient flows through it.

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: a shape, device or block length does not fit, or D is 0 and no `softmax_scale` given.

    Notes:
        No mask tensor exists on any backend. Softmax and sums run in float32 at least.
        Gradient: in q, k and v, by an op of its own.
        Backends: triton, flash_attn, cpu (AMX, AVX-512, AVX2 or portable), reference.
        Source: the block-wise causal attention of VAR (arXiv 2404.02905), section 3.2.

    Example:
        >>> q = torch.zeros(1, 3, 1, 1)
        >>> v = torch.tensor([1.0, 3.0, 8.0]).view(1, 3, 1, 1)
        >>> scale_block_attention(q, q, v, block_lengths=[2, 1]).flatten()
        tensor([2., 2., 4.])
        >>> scale_block_attention(q, q, v, block_lengths=[2, 1], return_lse=True)[1].exp().flatten()
        tensor([2., 2., 3.])
    """
    check_tensor("q", q, FLOATING)
    check_shape("q", q, "B T NH D")
    B, T, NH, D = q.shape
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor, (q.dtype,), like=q)
        check_shape(name, tensor, "B T NH D", B=B, T=T, NH=NH, D=D)
    lengths, factor = _lengths(block_lengths, T), _scale(q, softmax_scale)
    out: Tensor
    lse: Tensor
    out, lse = _attention(q, k, v, lengths, factor)
    return (out, lse.detach()) if return_lse else out


def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, *, softmax_scale: float | None = None
) -> Tensor:
    """One block of `scale_block_attention` while sampling: its queries attend to the rows of a cache in use.

    `softmax(softmax_scale * q k_cache[:, :length]^T) v_cache[:, :length]`. The rows of the block itself are
    in the caches already.

    Args:
        q, softmax_scale: as for `scale_block_attention`, q of `(B, L, NH, D)`.
        k_cache, v_cache: of the same dtype, `(B, Tmax, NH, D)`. Any strides.
        length: number of rows that are valid, 1 to Tmax; the others are not read.

    Returns:
        `(B, L, NH, D)` in the dtype of q.

    Raises:
        TypeError, ValueError: as `scale_block_attention`; ValueError also where `length` is out of range.
        RuntimeError: an argument asks for a gradient; the op has none.

    Notes:
        Calls block by block give what `scale_block_attention` gives, up to rounding.
        Backends and source are those of `scale_block_attention`.

    Example:
        >>> k_cache = torch.zeros(1, 3, 1, 1)
        >>> v_cache = torch.tensor([1.0, 3.0, torch.nan]).view(1, 3, 1, 1)
        >>> cached_attention(torch.zeros(1, 1, 1, 1), k_cache, v_cache, 2).flatten()
        tensor([2.])
    """
    check_tensor("q", q, FLOATING)
    check_shape("q", q, "B L NH D")
    B, _, NH, D = q.shape
    check_tensor("k_cache", k_cache, (q.dtype,), like=q)
    check_shape("k_cache", k_cache, "B Tmax NH D", B=B, NH=NH, D=D)
    Tmax = k_cache.shape[1]
    check_tensor("v_cache", v_cache, (q.dtype,), like=q)
    check_shape("v_cache", v_cache, "B Tmax NH D", B=B, Tmax=Tmax, NH=NH, D=D)
    check_integer("length", length, 1, Tmax, "Tmax")
    out: Tensor = _cached_attention(q, k_cache, v_cache, length, _scale(q, softmax_scale))
    return out


def _lengths(block_lengths: Sequence[int], T: int) -> list[int]:
    """The lengths of the blocks, which any iterable may give."""
    expected = f"block_lengths: expected integers of at least 1 with sum T={T}"
    try:
        lengths = list(block_lengths)
    except TypeError:
        raise TypeError(f"{expected}, found {block_lengths!r}") from None
    if not all(isinstance(length, INTEGER) for length in lengths):
        raise TypeError(f"{expected}, found {lengths}")
    if not lengths or min(lengths) < 1 or sum(lengths) != T:
        raise ValueError(f"{expected}, found {lengths}")
    return lengths


def _scale(q: Tensor, softmax_scale: float | None) -> float:
    """The factor of the scores, checked."""
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale)
        return softmax_scale
    if q.shape[-1] == 0:
        raise ValueError("softmax_scale: expected a number where D is 0, found None")
    return float(q.shape[-1] ** -0.5)


# --- flash kernels of PyTorch and FlashAttention, which know no blocks: once per block, on the keys it sees


def _by_block(attend: Callable[..., tuple[Tensor, Tensor]], *args: Any) -> tuple[Tensor, Tensor]:
    """As `reference.scale_block_attention`; `attend` is given queries, keys, values and the scale."""
    q, k, v, block_lengths, softmax_scale = args
    if q.numel() == 0:
        return reference.scale_block_attention(*args)
    q, k, v = _readable(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.promote_types(q.dtype, torch.float32))
    for length, end in zip(block_lengths, accumulate(block_lengths), strict=True):
        rows = slice(end - length, end)
        out[:, rows], lse[:, :, rows] = attend(q[:, rows], k[:, :end], v[:, :end], softmax_scale)
    return out, lse


def _backward_by_block(
    differentiate: Callable[..., Sequence[Tensor]], *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.scale_block_attention_backward`; sums over blocks run in the dtype of lse."""
    grad, q, k, v, out, lse, block_lengths, softmax_scale = args
    if q.numel() == 0:
        return reference.scale_block_attention_backward(*args)
    grad, q, k, v, out = _readable(grad, q, k, v, out)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_k, grad_v = (torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (k, v))
    for length, end in zip(block_lengths, accumulate(block_lengths), strict=True):
        rows = slice(end - length, end)
        given = grad[:, rows], q[:, rows], k[:, :end], v[:, :end], out[:, rows], lse[:, :, rows].contiguous()
        grad_q[:, rows], block_k, block_v = differentiate(*given, softmax_scale)
        grad_k[:, :end] += block_k
        grad_v[:, :end] += block_v
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _of_cache(attend: Callable[..., tuple[Tensor, Tensor]], *args: Any) -> Tensor:
    """As `reference.cached_attention`."""
    q, k_cache, v_cache, length, softmax_scale = args
    if q.numel() == 0:
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return attend(*_readable(q, k_cache[:, :length], v_cache[:, :length]), softmax_scale)[0].contiguous()


def _readable(*tensors: Tensor) -> list[Tensor]:
    """The tensors as flash kernels read them without a look: 16 bytes at once along a dense last axis."""

    def aligned(t: Tensor) -> bool:
        return t.data_ptr() % 16 == 0 and not any(stride % 8 for stride in t.stride()[:-1])

    return [
        t if t.stride(-1) == 1 and aligned(t) else t.clone(memory_format=torch.contiguous_format)
        for t in tensors
    ]


def _pytorch(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    given = (t.transpose(1, 2) for t in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*given, scale=softmax_scale)
    return out.transpose(1, 2), lse


def _pytorch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, softmax_scale: float
) -> list[Tensor]:
    given = (t.transpose(1, 2) for t in (grad, q, k, v, out))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *given, lse, 0.0, False, scale=softmax_scale
    )
    return [t.transpose(1, 2) for t in grads]


def _flash(
    version: FlashVersion, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    name, with_lse = {
        2: ("flash_attn_func", "return_attn_probs"),
        3: ("flash_attn_with_kvcache", "return_softmax_lse"),  # shares keys out where queries are few
        4: ("flash_attn_func", "return_lse"),
    }[version.number]
    out, lse, *_ = getattr(version.load(), name)(q, k, v, softmax_scale=softmax_scale, **{with_lse: True})
    return out, lse


def _flash_backward(version: FlashVersion, *args: Any) -> Sequence[Tensor]:
    grad, q, k, v, out, lse, softmax_scale = args
    module = version.load()
    if version.number == 4:
        grads: Sequence[Tensor] = module._flash_attn_bwd(
            q, k, v, out, grad, lse, softmax_scale=softmax_scale, deterministic=True
        )
        return grads
    # By position: names of the rest are not the same in all releases.
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    given = (grad, q, k, v, out, lse)
    if version.number == 3:
        segments = (None,) * 6
        module._flash_attn_backward(*given, *segments, *grads, softmax_scale, False, deterministic=True)
    else:
        dropout, causal, window, softcap, alibi_slopes, deterministic = 0.0, False, (-1, -1), 0.0, None, True
        module._flash_attn_backward(
            *given, *grads, dropout, softmax_scale, causal, *window, softcap, alibi_slopes, deterministic
        )
    return grads


@functools.lru_cache(maxsize=64)
def _segments(block_lengths: tuple[int, ...], B: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of B images as segments of queries, image by image; int32.

    Returns:
        Where each begins among the B T queries, and the end of the last; how many keys it sees; its image.
    """
    ends = list(accumulate(block_lengths))
    starts = [image * ends[-1] + start for image in range(B) for start in (0, *ends[:-1])]
    table = ([*starts, B * ends[-1]], ends * B, [image for image in range(B) for _ in ends])
    begins, visible, images = (torch.tensor(row, dtype=torch.int32, device=device) for row in table)
    return begins, visible, images


def _attention_flash(
    version: FlashVersion, q: Tensor, k: Tensor, v: Tensor, block_lengths: Sequence[int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """As `reference.scale_block_attention`; of version 3 one launch: keys are a cache, blocks segments."""
    if version.number != 3:
        return _by_block(functools.partial(_flash, version), q, k, v, block_lengths, softmax_scale)
    B, T, NH, D = q.shape
    q, k, v = _readable(q, k, v)
    begins, visible, images = _segments(tuple(block_lengths), B, q.device)
    out, lse, *_ = version.load().flash_attn_with_kvcache(
        q.reshape(B * T, NH, D),
        k,
        v,
        cu_seqlens_q=begins,
        max_seqlen_q=max(block_lengths),
        cache_seqlens=visible,
        cache_batch_idx=images,
        softmax_scale=softmax_scale,
        num_splits=1,
        return_softmax_lse=True,
    )
    return out.view(q.shape), lse.view(NH, B, T).transpose(0, 1).contiguous()


def _attention_backward_flash(version: FlashVersion, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_by_block(functools.partial(_flash_backward, version), *args)


def _cached_attention_flash(version: FlashVersion, *args: Any) -> Tensor:
    return _of_cache(functools.partial(_flash, version), *args)


def _flash_unsupported(*args: Any) -> str | None:
    values, softmax_scale = args[0], args[-1]
    if values.numel() == 0:
        return f"needs tensors that hold values, found {tuple(values.shape)}"
    if values.shape[3] % 8:
        return f"needs D of a multiple of 8, found {values.shape[3]}"
    return None if softmax_scale > 0 else f"needs a softmax_scale above 0, found {softmax_scale}"


# --- the ops


def _cached_attention_native(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, softmax_scale: float
) -> Tensor:
    """The kernel takes the last tokens, which are `q`, of those in keys and values."""
    keys, values = k_cache[:, :length], v_cache[:, :length]
    out: Tensor = native("_scale_block_attention", q, keys, values, [q.shape[1]], softmax_scale)[0]
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.block_lengths, ctx.softmax_scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradient(ctx: Any, grad: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = _attention_backward(grad, *ctx.saved_tensors, ctx.block_lengths, ctx.softmax_scale)
    return *grads, None, None


@op(
    "scale_block_attention(Tensor q, Tensor k, Tensor v, int[] block_lengths, float softmax_scale) "
    "-> (Tensor, Tensor)",
    reference=reference.scale_block_attention,
    triton=Launch(triton.scale_block_attention_triton, limits=triton.LIMITS, unless=triton.unsupported),
    flash_attn=Flash(_attention_flash, unless=_flash_unsupported),
    native=Native(
        "_scale_block_attention", dtypes=UP_TO_FLOAT32, otherwise=functools.partial(_by_block, _pytorch)
    ),
    gradient=Gradient(_save, _gradient),
)
def _attention(
    q: Tensor, k: Tensor, v: Tensor, block_lengths: list[int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    B, T, NH, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, NH, T), dtype=torch.promote_types(q.dtype, torch.float32))


@op(
    "scale_block_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "int[] block_lengths, float softmax_scale) -> (Tensor, Tensor, Tensor)",
    reference=reference.scale_block_attention_backward,
    triton=Launch(
        triton.scale_block_attention_backward_triton, limits=triton.LIMITS, unless=triton.unsupported
    ),
    flash_attn=Flash(_attention_backward_flash, any_dtype=("lse",), unless=_flash_unsupported),
    native=Native(
        "_scale_block_attention_backward",
        dtypes=(torch.float32,),
        otherwise=functools.partial(_backward_by_block, _pytorch_backward),
    ),
)
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@op(
    "cached_attention(Tensor q, Tensor k_cache, Tensor v_cache, SymInt length, float softmax_scale) "
    "-> Tensor",
    reference=reference.cached_attention,
    triton=Launch(triton.cached_attention_triton, limits=triton.LIMITS, unless=triton.unsupported),
    flash_attn=Flash(_cached_attention_flash, unless=_flash_unsupported),
    native=Native(
        "_scale_block_attention",
        run=_cached_attention_native,
        dtypes=UP_TO_FLOAT32,
        otherwise=functools.partial(_of_cache, _pytorch),
    ),
)
def _cached_attention(q: Tensor, *_rest: Any) -> Tensor:
    return q.new_empty(q.shape)
