"""The sampler of VAR's transformer, on the ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.checks import has_values
from hitsr_fast.compat.var import VectorQuantizer2
from hitsr_fast.nn.cached_body import CachedBody
from hitsr_fast.nn.versions import Version, version_of
from hitsr_fast.ops import modulated_layer_norm, residual_step, sample_codes


class _Weights(NamedTuple):
    """Of blocks and classifier, the latter as `(V, C)` and `(V,)`."""

    body: CachedBody
    head: tuple[Tensor, Tensor]


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

    It reads the model's own parameters. Where it computes in another dtype than theirs they are converted
    once, and anew after they have changed; only what writes to their `.data` goes unseen then.

    Args:
        model: of VAR's class, with a `VectorQuantizer2` of this package in its `vae_quant_proxy`.
        dtype: of blocks and classifier; None for autocast's where that is on, else the weights' own.
    """

    def __init__(self, model: Any, dtype: torch.dtype | None) -> None:
        self.model = model
        self.dtype = dtype
        self._kept: _Weights | None = None
        self._sources: list[tuple[Tensor, Version]] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None, "_sources": []}

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
        start = 0
        for step, side in enumerate(sides):
            ratio = step / max(len(sides) - 1, 1)
            x = body(rows.to(weights.head[0].dtype), modulation, cache, start)
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
                start += lengths[step]
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
        """Those of blocks and classifier in a dtype, or in their own.

        Where nothing is converted they are the parameters themselves and a few small vectors, made in a
        millisecond, so that any change is seen; a converted copy is kept until a parameter has changed.
        """
        blocks, head = self.model.blocks, self.model.head
        dtype = dtype or head.weight.dtype
        sources = [*blocks.parameters(), *head.parameters()]
        if all(tensor.dtype == dtype for tensor in sources) or not has_values(head.weight):
            return self._made(dtype)
        kept = self._kept
        if kept is None or kept.head[0].dtype != dtype or not _unchanged(sources, self._sources):
            kept = self._kept = self._made(dtype)
            self._sources = [(tensor.detach(), version_of(tensor)) for tensor in sources]
        return kept

    def _made(self, dtype: torch.dtype) -> _Weights:
        blocks, head = self.model.blocks, self.model.head
        attention, norm = blocks[0].attn, blocks[0].ln_wo_grad
        body = CachedBody(blocks, attention.num_heads, float(attention.scale), dtype, norm.eps)
        return _Weights(body, (head.weight.to(dtype), head.bias.to(dtype)))


def _unchanged(tensors: Sequence[Tensor], known: Sequence[tuple[Tensor, Version]]) -> bool:
    """Whether they are in the memory that those known hold, and unwritten by PyTorch's count."""
    return len(tensors) == len(known) and all(
        (tensor.dtype, tensor.device) == (alias.dtype, alias.device)
        and tensor.data_ptr() == alias.data_ptr()
        and not tensor.is_inference()
        and version_of(tensor) == version
        for tensor, (alias, version) in zip(tensors, known, strict=True)
    )
