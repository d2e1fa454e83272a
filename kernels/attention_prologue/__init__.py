"""Triton kernel of `attention_prologue`; docs/ops/attention_prologue.md.

Some heads of one token: q, k and v side by side in registers, from the qkv product to their places.
"""

import triton
import triton.language as tl


@triton.jit
def _heads(at, bias, stride_qkv, stride_bias, place, inside):
    """Values at some places of a token's qkv in float32, with their bias."""
    values = tl.load(at + place * stride_qkv[2], mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + place * stride_bias[0], mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def _inverse_length(values):
    """Of each row. NaN stays NaN."""
    length = tl.sqrt(tl.sum(values * values, axis=1))
    return 1 / tl.where(length < 1e-12, 1e-12, length)


@triton.jit
def _turned(values, cosine, sine, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Pairs of neighbours in each row, turned."""
    even, odd = tl.split(tl.reshape(values, (HEADS, BLOCK // 2, 2)))
    pairs = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    return tl.reshape(pairs, (HEADS, BLOCK))


# L and start differ from call to call: one compilation serves them all.
@triton.jit(do_not_specialize=["L", "start"])
def _attention_prologue_kernel(
    qkv, bias, q_scale, rotary, q, k_cache, v_cache, L, start,
    stride_qkv, stride_k, stride_v, stride_bias, stride_scale, stride_rotary,
    NH: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HEADS heads of token (image, row) of qkv (B, L, 3 * NH * D): to q (B, L, NH, D), which is contiguous,
    and to row `start + token` of the caches (B, Tmax, NH, D).

    bias: (3 * NH * D,). q_scale: (NH,). rotary: (L, D / 2, 2). Each of them may be None. HEADS, BLOCK: powers
    of two; BLOCK is at least D and 2.
    """
    token, image = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, BLOCK)
    inside = (head < NH)[:, None] & (channel < D)[None, :]
    far_head, far_channel = head.to(tl.int64)[:, None], channel.to(tl.int64)[None, :]
    place = far_head * D + far_channel
    at = qkv + image * stride_qkv[0] + token * stride_qkv[1]
    query = _heads(at, bias, stride_qkv, stride_bias, place, inside)
    key = _heads(at, bias, stride_qkv, stride_bias, NH * D + place, inside)
    value = _heads(at, bias, stride_qkv, stride_bias, 2 * NH * D + place, inside)
    if q_scale is not None:
        scale = tl.load(q_scale + head.to(tl.int64) * stride_scale[0], mask=head < NH, other=0.0)
        query *= (scale * _inverse_length(query))[:, None]
        key *= _inverse_length(key)[:, None]
    if rotary is not None:
        pair = tl.arange(0, BLOCK // 2)
        angle = rotary + token * stride_rotary[0] + pair.to(tl.int64) * stride_rotary[1]
        cosine = tl.load(angle, mask=pair < D // 2, other=0.0)[None, :]
        sine = tl.load(angle + stride_rotary[2], mask=pair < D // 2, other=0.0)[None, :]
        query = _turned(query, cosine, sine, HEADS, BLOCK)
        key = _turned(key, cosine, sine, HEADS, BLOCK)
    tl.store(q + (image * L + token) * (NH * D) + place, query, mask=inside)
    at = k_cache + image * stride_k[0] + (start + token) * stride_k[1]
    tl.store(at + far_head * stride_k[2] + far_channel * stride_k[3], key, mask=inside)
    at = v_cache + image * stride_v[0] + (start + token) * stride_v[1]
    tl.store(at + far_head * stride_v[2] + far_channel * stride_v[3], value, mask=inside)
