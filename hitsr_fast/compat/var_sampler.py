"""The sampler of VAR's transformer, on the ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.compat.var import VectorQuantizer2
from hitsr_fast.nn.attention import KVCache
from hitsr_fast.ops import (
    cached_attention,
    gated_residual,
    modulated_layer_norm,
    residual_step,
    sample_codes,
)


class BlockWeights(NamedTuple):
    """Of one block; linears as (weight, bias), `q_scale` `(NH,)` float32 or None without an L2 norm."""

    qkv: tuple[Tensor, Tensor]
    q_scale: Tensor | None
    proj: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]


class CachedBody:
    """The blocks, one scale at a time."""

    def __init__(
        self, blocks: Sequence[BlockWeights], *, heads: int, softmax_scale: float, eps: float
    ) -> None:
        self.blocks, self.heads, self.softmax_scale, self.eps = blocks, heads, softmax_scale, eps

    def new_cache(self, batch: int, tokens: int) -> list[KVCache]:
        weight = self.blocks[0].proj[0]
        head_dim = weight.shape[0] // self.heads
        return [
            KVCache(batch, tokens, self.heads, head_dim, weight.dtype, weight.device) for _ in self.blocks
        ]

    def step(self, x: Tensor, modulation: Tensor, caches: list[KVCache]) -> Tensor:
        for block, rows, cache in zip(self.blocks, modulation, caches, strict=True):
            gamma1, gamma2, scale1, scale2, shift1, shift2 = rows
            normed = modulated_layer_norm(x, scale1, shift1, eps=self.eps)
            x = gated_residual(x, self._attend(normed, block, cache), gamma1)
            normed = modulated_layer_norm(x, scale2, shift2, eps=self.eps)
            branch = F.linear(F.gelu(F.linear(normed, *block.fc1), approximate="tanh"), *block.fc2)
            x = gated_residual(x, branch, gamma2)
        return x

    def _attend(self, x: Tensor, block: BlockWeights, cache: KVCache) -> Tensor:
        q, k, v = F.linear(x, *block.qkv).unflatten(2, (3, self.heads, -1)).unbind(2)
        if block.q_scale is not None:
            q = (F.normalize(q.float(), dim=-1) * block.q_scale[:, None]).to(v.dtype)
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
        start, end = cache.length, cache.length + x.shape[1]
        cache.k[:, start:end] = k
        cache.v[:, start:end] = v
        cache.length = end
        out = cached_attention(q, cache.k, cache.v, end, softmax_scale=self.softmax_scale)
        return F.linear(out.flatten(2), *block.proj)


class _Weights(NamedTuple):
    """Of blocks and classifier, the latter as `(V, C)` and `(V,)`; `made_of` tells when they are old."""

    body: CachedBody
    head: tuple[Tensor, Tensor]
    made_of: tuple[Any, ...]


class _Draw(NamedTuple):
    """How codes come from logits; see `VarSampler.autoregressive_infer_cfg`."""

    cfg: float
    top_k: int
    top_p: float
    generator: torch.Generator | None

    def codes(self, logits: Tensor, uncond_logits: Tensor | None, ratio: float) -> Tensor:
        """int64 `(B, L)` of `(B, L, V)`; the second are read where there is guidance."""
        guidance = self.cfg * ratio
        if uncond_logits is not None and guidance < 0:
            logits, uncond_logits, guidance = self._guided(logits, uncond_logits, ratio), None, 0.0
        return sample_codes(
            logits,
            uncond_logits=uncond_logits,
            guidance=guidance,
            top_k=max(self.top_k, 0),
            top_p=min(max(self.top_p, 0.0), 1.0),
            generator=self.generator,
        )

    def mixture(self, logits: Tensor, uncond_logits: Tensor | None, ratio: float, codebook: Tensor) -> Tensor:
        """Mixtures `(B, L, C)` of codes `(V, C)`: the softmax of filtered logits with Gumbel noise.

        The temperature falls from 0.27 at the first scale to 0.0135 at the last; logits count up to twice.
        """
        logits = self._filtered(self._guided(logits, uncond_logits, ratio))
        noise = -torch.empty_like(logits).exponential_(generator=self.generator).log()
        temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
        weights = ((logits * (1 + ratio) + noise) / temperature).softmax(dim=-1)
        return weights.to(codebook.dtype) @ codebook

    def _guided(self, logits: Tensor, uncond_logits: Tensor | None, ratio: float) -> Tensor:
        if uncond_logits is None:
            return logits
        return (1 + self.cfg * ratio) * logits - self.cfg * ratio * uncond_logits

    def _filtered(self, logits: Tensor) -> Tensor:
        """-infinity for what top-k and top-p leave out."""
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p > 0:
            ascending, order = logits.sort(dim=-1)
            dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.top_p
            dropped[..., -1] = False
            logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
        return logits


class VarSampler:
    """Samples from a VAR: static KV cache, AdaLN once a call, one branch where there is no guidance.

    It reads the model's own parameters. Those that it computes with in another dtype than they have are
    converted once, and anew after they have changed; only what writes to their `.data` goes unseen.

    Args:
        model: of VAR's class, with a `VectorQuantizer2` of this package in its `vae_quant_proxy`.
        dtype: of blocks and classifier; None for autocast's where that is on, else the weights' own.
    """

    def __init__(self, model: Any, dtype: torch.dtype | None) -> None:
        self.model = model
        self.dtype = dtype
        self._kept: _Weights | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        B: int,
        label_B: int | Tensor | None,
        g_seed: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
    ) -> Tensor:
        """Sample images as VAR's method does, but for what training mode drops.

        Args:
            B: how many.
            label_B: class of all, below 0 for none, or int64 `(B,)`; None draws them.
            g_seed: of the random numbers; None goes on with PyTorch's own.
            cfg: guidance at the last scale, rising linearly from 0 at the first; 0 runs no second branch.
            top_k: keep the k largest logits; 0 keeps all, 1 is greedy.
            top_p: then keep the largest with a share of `top_p`; 0 keeps all.
            more_smooth: mixtures of codes, weighted by a softmax with Gumbel noise, instead of codes.

        Returns:
            `(B, 3, H, W)` in [0, 1].

        Raises:
            ValueError: B is below 1, or `label_B` is a tensor of another shape than `(B,)`.
        """
        model = self.model
        generator = None if g_seed is None else model.rng.manual_seed(g_seed)
        labels = self._labels(B, label_B, generator)
        device = labels.device.type
        ambient = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            weights = self._weights(self.dtype or ambient)
            f_hat = self._latent(labels, weights, _Draw(cfg, top_k, top_p, generator), more_smooth)
        image: Tensor = model.vae_proxy[0].fhat_to_img(f_hat)
        return image.add_(1).mul_(0.5)

    def _labels(self, B: int, label_B: int | Tensor | None, generator: torch.Generator | None) -> Tensor:
        """int64 `(B,)`."""
        model = self.model
        if B < 1:
            raise ValueError(f"B: expected at least 1, found {B}")
        if label_B is None:
            drawn = torch.multinomial(model.uniform_prob, B, replacement=True, generator=generator)
            return drawn.view(B)
        if not isinstance(label_B, Tensor):
            label = model.num_classes if label_B < 0 else label_B
            return torch.full((B,), label, device=model.lvl_1L.device)
        if label_B.shape != (B,):
            raise ValueError(f"label_B: expected shape (B={B},), found {tuple(label_B.shape)}")
        return label_B

    def _latent(self, labels: Tensor, weights: _Weights, draw: _Draw, more_smooth: bool) -> Tensor:
        """The sum of all scales, `(B, Cvae, H, W)`."""
        model, B, body = self.model, len(labels), weights.body
        sides: Sequence[int] = model.patch_nums
        lengths = [side * side for side in sides]
        branches = 1 if draw.cfg == 0 else 2
        if branches == 2:
            labels = torch.cat([labels, torch.full_like(labels, model.num_classes)])
        condition: Tensor = model.class_emb(labels)
        modulation = self._modulation(condition)
        head_scale, head_shift = model.head_nm.ada_lin(condition).chunk(2, dim=-1)
        places = (model.lvl_embed(model.lvl_1L) + model.pos_1LC).split(lengths, dim=1)
        rows = condition[:, None] + model.pos_start + places[0]
        cache = body.new_cache(len(labels), sum(lengths))
        quantizer: VectorQuantizer2 = model.vae_quant_proxy[0]
        codebook, phi_weight, phi_bias = quantizer.bank()
        phi_index = quantizer.phi_index(len(sides))
        wide = torch.promote_types(codebook.dtype, torch.float32)
        f_hat = torch.zeros(B, codebook.shape[1], sides[-1], sides[-1], dtype=wide, device=codebook.device)
        for step, side in enumerate(sides):
            ratio = step / max(len(sides) - 1, 1)
            x = body.step(rows.to(weights.head[0].dtype), modulation, cache)
            seen = B if draw.cfg * ratio == 0 else 2 * B  # else the second branch is there for its keys alone
            normed = modulated_layer_norm(
                x[:seen], head_scale[:seen], head_shift[:seen], eps=model.head_nm.ln_wo_grad.eps
            )
            logits = F.linear(normed, *weights.head).float()
            pair = (logits[:B], logits[B:] if seen > B else None)
            if more_smooth:
                h = draw.mixture(*pair, ratio, codebook).transpose(1, 2).unflatten(2, (side, side))
                _, inputs = quantizer.get_next_autoregressive_input(step, len(sides), f_hat, h)
            else:
                inputs = residual_step(
                    f_hat,
                    draw.codes(*pair, ratio),
                    codebook,
                    phi_weight[phi_index[step]],
                    phi_bias[phi_index[step]],
                    scale=(side, side),
                    next_scale=(sides[step + 1],) * 2 if step + 1 < len(sides) else None,
                    phi_ratio=quantizer.phi_ratio,
                )
            if step + 1 < len(sides):
                rows = model.word_embed(inputs.flatten(2).transpose(1, 2).to(condition.dtype))
                rows = (rows + places[step + 1]).repeat(branches, 1, 1)
        return f_hat.to(condition.dtype)

    def _modulation(self, condition: Tensor) -> Tensor:
        """What AdaLN does in each block, `(blocks, 6, B, C)`: gates, scales and shifts, in VAR's order."""
        model, shape = self.model, (-1, 6, condition.shape[1])
        shared = model.shared_ada_lin(condition)
        rows = [
            (block.ada_gss + shared if block.shared_aln else block.ada_lin(condition)).reshape(shape)
            for block in model.blocks
        ]
        return torch.stack(rows).transpose(1, 2).contiguous()

    def _weights(self, dtype: torch.dtype | None) -> _Weights:
        """Those of blocks and classifier in a dtype, or in their own."""
        blocks = self.model.blocks
        sources = [*blocks.parameters(), *blocks.buffers(), *self.model.head.parameters()]
        made_of = (dtype, *(_state(tensor) for tensor in sources))
        if self._kept is None or self._kept.made_of != made_of:
            self._kept = self._made(dtype or self.model.head.weight.dtype, made_of)
        return self._kept

    def _made(self, dtype: torch.dtype, made_of: tuple[Any, ...]) -> _Weights:
        def linear(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            return weight.detach().to(dtype), bias.detach().to(dtype)

        blocks = []
        for block in self.model.blocks:
            attention, ffn, q_scale = block.attn, block.ffn, None
            bias = torch.cat([attention.q_bias, attention.zero_k_bias, attention.v_bias])
            if attention.attn_l2_norm:
                q_scale = attention.scale_mul_1H11.float().clamp_max(attention.max_scale_mul).exp().flatten()
            blocks.append(
                BlockWeights(
                    linear(attention.mat_qkv.weight, bias),
                    q_scale,
                    linear(attention.proj.weight, attention.proj.bias),
                    linear(ffn.fc1.weight, ffn.fc1.bias),
                    linear(ffn.fc2.weight, ffn.fc2.bias),
                )
            )
        first, head = self.model.blocks[0], self.model.head
        body = CachedBody(
            blocks,
            heads=first.attn.num_heads,
            softmax_scale=float(first.attn.scale),
            eps=first.ln_wo_grad.eps,
        )
        return _Weights(body, linear(head.weight, head.bias), made_of)


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """Differs after a tensor has changed, but for writes to its `.data`."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device
