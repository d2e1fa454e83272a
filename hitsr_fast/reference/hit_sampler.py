"""Definition of HIT-VAR's sampler as public code of VAR runs it: eager, launch by launch, nothing kept.

Against this the fast sampler is tested and timed. It takes a `HitVar` and reads its weights; AdaLN runs at
each scale, keys and values are concatenated, the classifier sees all tokens, and guidance doubles the batch
throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.reference.residual_quantize import arithmetic_dtype, residual_step
from hitsr_fast.reference.sample_codes import sample_codes


@torch.no_grad()
def sample(
    model: Any,
    lr_features: Tensor,
    class_id: Tensor,
    *,
    targets: int | None = None,
    strengths: Sequence[float] | None = None,
    top_k: int = 1,
    top_p: float = 1.0,
    states: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Sample a token pyramid.

    Args:
        model: A `HitVar`.
        lr_features: `(B, C, h, w)`, the latent of the up-sampled LR, in the dtype of the weights.
        class_id: `(B,)` int64.
        targets: Stop after this many targets, coarsest first; all by default.
        strengths: Of guidance, one a scale; None is no guidance.
        top_k, top_p: See `reference.sample_codes`.
        states: int64 `(steps, 2)`, seed and offset of each scale's draws; None when greedy.

    Returns:
        Tokens `(B, T)` int64, and the latent `(B, C, h, w)` of each finished target.
    """
    transformer, config = model.transformer, model.config
    tokenizer, batch = config.tokenizer, len(class_id)
    if strengths is not None:
        class_id = torch.cat([class_id, torch.full_like(class_id, config.transformer.num_classes - 1)])
        lr_features = torch.cat([lr_features, lr_features])
    condition = transformer.class_emb(class_id)
    caches: list[tuple[Tensor, Tensor] | None] = [None] * len(transformer.blocks)
    inputs: Tensor | None = None
    tokens: list[Tensor] = []
    targets = len(tokenizer.targets) if targets is None else targets
    reconstruction = _Reconstruction(model, batch, targets)
    for step in range(tokenizer.pyramid.steps[targets - 1]):
        if inputs is None:
            x = transformer.first_block(lr_features, condition)
        else:
            rows = inputs.to(condition.dtype).flatten(2).transpose(1, 2)
            rows = rows if strengths is None else torch.cat([rows, rows])
            x = transformer.scale_block(rows, lr_features, step)
        both = step_logits(transformer, x, condition, caches)[:, -tokenizer.pyramid.lengths[step] :]
        logits, strength = both[:batch], 0.0 if strengths is None else strengths[step]
        uncond = both[batch:] if strength > 0 else None
        if top_k == 1:
            guided = logits if uncond is None else (1 + strength) * logits - strength * uncond
            tokens.append(guided.argmax(dim=-1))
        else:
            state = None if states is None else states[step]
            tokens.append(sample_codes(logits, uncond, state, strength, top_k, top_p, 1.0))
        inputs = reconstruction.advance(step, tokens[-1])
    return torch.cat(tokens, 1), reconstruction.maps


@torch.no_grad()
def super_resolve(model: Any, lr: Tensor, class_id: int = 1) -> dict[int, Tensor]:
    """Greedy `HitVar.super_resolve` of LR tiles `(B, 3, t, t)`: `{factor: (B, 3, factor t, factor t)}`."""
    classes = torch.full((len(lr),), class_id, dtype=torch.int64, device=lr.device)
    _, latents = sample(model, model.lr_features(lr), classes)
    return {
        factor: model.decode(latents, target, lr).float().clamp(-1, 1)
        for target, factor in enumerate(model.config.scale_factors)
    }


def step_logits(
    transformer: Any, x: Tensor, condition: Tensor, caches: list[tuple[Tensor, Tensor] | None]
) -> Tensor:
    """A `HitTransformer` on new tokens `(B, L, width)`: logits `(B, L, K)`, float32 at least.

    `condition` `(B, width)` are class vectors. `caches` are of each block the keys and values
    `(B, NH, T, D)` of the tokens before, or None; those of the new tokens are added.
    """
    for number, block in enumerate(transformer.blocks):
        x, caches[number] = _block(block, x, condition, caches[number])
    scale, shift = transformer.head_nm.ada_lin(condition)[:, None].chunk(2, dim=-1)
    logits: Tensor = transformer.head(_norm(x, scale, shift)).float()
    return logits


def _norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _block(
    block: Any, x: Tensor, condition: Tensor, cache: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """VAR's block on new tokens, with the keys and values of all tokens so far `(B, NH, T, D)`."""
    gamma1, gamma2, scale1, scale2, shift1, shift2 = block.ada_lin(condition)[:, None].chunk(6, dim=-1)
    attn, ffn = block.attn, block.ffn
    b, length, width = x.shape
    bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    qkv = F.linear(_norm(x, scale1, shift1), attn.mat_qkv.weight, bias)
    q, k, v = qkv.view(b, length, 3, attn.heads, -1).permute(2, 0, 3, 1, 4).unbind()
    softmax_scale = 0.25 / math.sqrt(width // attn.heads)
    if attn.l2_norm:
        wide = torch.promote_types(x.dtype, torch.float32)
        factor = attn.scale_mul_1H11.float().clamp_max(math.log(100.0)).exp()
        q = (F.normalize(q.to(wide), dim=-1) * factor).to(v.dtype)
        k = F.normalize(k.to(wide), dim=-1).to(v.dtype)
        softmax_scale = 1.0
    if cache is not None:
        k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
    out = F.scaled_dot_product_attention(q, k, v, scale=softmax_scale)
    x = x + gamma1 * attn.proj(out.transpose(1, 2).reshape(b, length, width))
    x = x + gamma2 * ffn.fc2(F.gelu(ffn.fc1(_norm(x, scale2, shift2)), approximate="tanh"))
    return x, (k, v)


class _Reconstruction:
    """The reconstruction of each target as it grows; every code is spread out on the grid of each target."""

    def __init__(self, model: Any, batch: int, targets: int) -> None:
        self.banks, self.pyramid = model.tokenizer.quantize.banks()[:targets], model.config.tokenizer.pyramid
        self.full_grid = model.config.transformer.ar_grid == "full"
        codebook = self.banks[0].codebook
        options = {"dtype": arithmetic_dtype(codebook), "device": codebook.device}
        self.maps = [
            torch.zeros(batch, codebook.shape[1], *size, **options) for size in self.pyramid.targets[:targets]
        ]

    def advance(self, step: int, codes: Tensor) -> Tensor | None:
        """Add a scale's codes; the next scale's inputs `(B, C, h, w)`, None after the last scale."""
        sizes, steps, inputs = self.pyramid.sizes, self.pyramid.steps, None
        owner = len(self.maps) - 1 if self.full_grid else sum(step + 1 >= end for end in steps)
        for target, (grown, bank) in enumerate(zip(self.maps, self.banks, strict=True)):
            if step >= steps[target]:
                continue
            following = sizes[step + 1] if owner == target and step + 1 < len(sizes) else (0, 0)
            phi = bank.phi_index[step]
            weight, bias = bank.phi_weight[phi], bank.phi_bias[phi]
            pooled = residual_step(
                grown, codes, bank.codebook, weight, bias, sizes[step], following, bank.phi_ratio
            )
            inputs = pooled if owner == target else inputs
        return inputs
