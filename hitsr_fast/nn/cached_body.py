"""VAR's blocks for sampling: weights in one dtype, AdaLN from a table, keys and values in a static cache."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.checks import check_integer, check_shape
from hitsr_fast.nn.attention import score_factor
from hitsr_fast.ops import attention_prologue, cached_attention, gated_residual_norm, modulated_layer_norm

# Whether this build of PyTorch has oneDNN's linear map with an activation, which its compiler uses.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class KVCache(NamedTuple):
    """Keys and values of all layers, `(layers, B, T, NH, D)`, which `attention_prologue` writes in place."""

    k: Tensor
    v: Tensor

    def first(self, batch: int) -> KVCache:
        """The first `batch` sequences, in the same memory; an error where there are not so many."""
        check_integer("batch", batch, 0, self.k.shape[1], "B")
        return KVCache(self.k[:, :batch], self.v[:, :batch])


class Stream(NamedTuple):
    """Rows `x` `(B, L, C)`, and a `branch` that they gain, times `gate` `(B, C)`, as they are normalised."""

    x: Tensor
    branch: Tensor
    gate: Tensor

    def normed(self, scale: Tensor, shift: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """The rows with their branch, and the `modulated_layer_norm` of these; see `gated_residual_norm`."""
        return gated_residual_norm(*self, scale, shift, **options)

    def last(self, batch: int, tokens: int) -> Stream:
        """Of the first sequences the last tokens."""
        return Stream(self.x[:batch, -tokens:], self.branch[:batch, -tokens:], self.gate[:batch])


class CachedBlock(NamedTuple):
    """Weights of one AdaLN block of VAR, without its AdaLN linear."""

    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    q_scale: Tensor | None  # float32; None where q and k are not normalised

    @classmethod
    def of(cls, block: Any, dtype: torch.dtype) -> CachedBlock:
        """Weights of a block with VAR's names in a dtype, shared where it is their own.

        The names are `attn.mat_qkv`, `attn.q_bias`, `attn.v_bias`, `attn.proj`, `ffn.fc1`, `ffn.fc2`, and
        `attn.scale_mul_1H11` where q and k are normalised.
        """
        attn, ffn = block.attn, block.ffn
        weights = [attn.mat_qkv.weight, torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])]
        weights += [part for linear in (attn.proj, ffn.fc1, ffn.fc2) for part in (linear.weight, linear.bias)]
        log_scale = getattr(attn, "scale_mul_1H11", None)
        q_scale = None if log_scale is None else score_factor(log_scale.detach())
        return cls._make([*(weight.detach() for weight in weights), q_scale]).to(dtype)

    def to(self, dtype: torch.dtype) -> CachedBlock:
        """The same in another dtype."""
        *weights, q_scale = self
        return CachedBlock._make([*(weight.to(dtype) for weight in weights), q_scale])

    def run(
        self,
        x: Tensor | Stream,
        modulation: Tensor,
        cache: tuple[Tensor, Tensor],
        start: int,
        body: CachedBody,
    ) -> Stream:
        """As `CachedBody`, of one block: `modulation` is `(6, B, C)`, `cache` its keys and values.

        In float32 `x` loses less from block to block.
        """
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind()
        options: dict[str, Any] = {"eps": body.eps, "out_dtype": self.qkv_weight.dtype}
        if isinstance(x, Stream):
            x, normed = x.normed(scale1, shift1, **options)
        else:
            normed = modulated_layer_norm(x, scale1, shift1, **options)
        qkv = F.linear(normed, self.qkv_weight)
        q = attention_prologue(qkv, *cache, start, bias=self.qkv_bias, q_scale=self.q_scale)
        attended = cached_attention(q, *cache, start + x.shape[1], softmax_scale=body.softmax_scale)
        branch = F.linear(attended.flatten(2), self.proj_weight, self.proj_bias)
        x, normed = Stream(x, branch, gamma1).normed(scale2, shift2, **options)
        hidden = linear_gelu(normed, self.fc1_weight, self.fc1_bias)
        return Stream(x, F.linear(hidden, self.fc2_weight, self.fc2_bias), gamma2)


class CachedBody:
    """VAR's stack of blocks (see `CachedBlock.of`), run on one scale's tokens after the other.

    `dtype` is that of weights and cache, `softmax_scale` the factor of the scores, `eps` that of the norms.
    """

    def __init__(
        self, blocks: Iterable[Any], heads: int, softmax_scale: float, dtype: torch.dtype, eps: float = 1e-6
    ) -> None:
        self.heads, self.softmax_scale, self.dtype, self.eps = heads, softmax_scale, dtype, eps
        self.blocks = [CachedBlock.of(block, dtype) for block in blocks]

    def to(self, dtype: torch.dtype) -> CachedBody:
        """The same in another dtype."""
        other = copy.copy(self)
        other.dtype, other.blocks = dtype, [block.to(dtype) for block in self.blocks]
        return other

    def new_cache(self, batch: int, tokens: int) -> KVCache:
        """A cache for `batch` sequences of up to `tokens` tokens; what is not written is not initialised."""
        weight = self.blocks[0].qkv_weight
        shape = len(self.blocks), batch, tokens, self.heads, weight.shape[1] // self.heads
        return KVCache(weight.new_empty(shape), weight.new_empty(shape))

    def __call__(self, x: Tensor, modulation: Tensor, cache: KVCache, start: int) -> Stream:
        """Output for new tokens `x` `(B, L, C)`, which see the first `start` ones and themselves.

        The last block's second branch is still apart from it, as the norm that follows takes both in one
        pass.

        Args:
            x: Floating, as is the output.
            modulation: `(layers, 6, B, C)`: a block's six rows, in VAR's order.
            cache: From `new_cache`; rows from `start` on are written.
            start: Tokens before these.

        Raises:
            ValueError: `modulation` or `cache` is not of this stack's layers, or a shape does not fit.
        """
        layers = len(self.blocks)
        check_shape("x", x, "B L C")
        sides = {"layers": layers, "6": 6, "B": len(x), "C": x.shape[2]}
        check_shape("modulation", modulation, "layers 6 B C", **sides)
        check_shape("cache.k", cache.k, "layers B T NH D", layers=layers)
        out: Tensor | Stream = x
        for block, rows, k, v in zip(self.blocks, modulation, cache.k, cache.v, strict=True):
            out = block.run(out, rows, (k, v), start, self)
        assert isinstance(out, Stream)
        return out


@torch.no_grad()
def modulation_table(ada_lins: Sequence[nn.Module], vectors: Tensor) -> Tensor:
    """What AdaLN makes of class vectors `(classes, C)`, once for all scales: `(layers, parts, classes, C)`.

    `ada_lins` are SiLU and linear map `C -> parts * C` of each layer, in the dtype of the vectors.
    """
    rows: Tensor = torch.stack([ada_lin(vectors) for ada_lin in ada_lins])
    table: Tensor = rows.unflatten(2, (-1, vectors.shape[1])).transpose(1, 2).contiguous()
    return table


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu(x W^T + b)` in GELU's tanh form; one call of oneDNN on CPUs, where the gelu alone costs more."""
    # PyTorch's compiler fuses by itself, and takes this call only with constant weights.
    if _ONEDNN and not torch.compiler.is_compiling() and x.device.type == "cpu" and _onednn_takes(x.dtype):
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")
        return fused
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies `dtype` on this CPU; PyTorch's own calls ask it too and have another way."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
