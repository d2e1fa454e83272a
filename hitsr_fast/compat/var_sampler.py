"""The sampler of VAR's transformer, on the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hitsr_fast.checks import has_values
from hitsr_fast.compat.var import VectorQuantizer2
from hitsr_fast.nn.bank import ReconstructionWalk
from hitsr_fast.nn.cached_body import CachedBody
from hitsr_fast.nn.sampling import Classifier, SamplingOptions, SamplingPlan, guided_logits, sample_scales
from hitsr_fast.ops.cuda_graphs import Graphs
from hitsr_fast.precision import autocast_dtype


class _Weights(NamedTuple):
    """Of blocks and classifier."""

    body: CachedBody
    head: Classifier

    @classmethod
    def of(cls, model: Any, dtype: torch.dtype) -> _Weights:
        """Those of a VAR in a dtype: its own parameters where it is theirs, and a few small vectors."""
        attention, norm, head = model.blocks[0].attn, model.blocks[0].ln_wo_grad, model.head
        body = CachedBody(model.blocks, attention.num_heads, float(attention.scale), dtype, norm.eps)
        return cls(body, Classifier(head.weight.to(dtype), head.bias.to(dtype)))


def mixtures(
    logits: Tensor,
    codebook: Tensor,
    *,
    ratio: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Mixtures `(B, L, C)` of codes `(V, C)`: the softmax of filtered logits `(B, L, V)` with Gumbel noise.

    The temperature falls from 0.27 at the first scale, where `ratio` is 0, to 0.0135 at the last, where it is
    1; logits count up to twice.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    weights = ((logits * (1 + ratio) + noise) / temperature).softmax(dim=-1)
    return weights.to(codebook.dtype) @ codebook


class VarSampler:
    """Samples from a VAR: static KV cache, AdaLN once a call, one branch where there is no guidance.

    It reads the model's own parameters. Where it computes in another dtype than theirs each call converts
    them, so that no way of changing them goes unseen.

    On a GPU all from the labels to the latent is a CUDA graph for each B and for each set of scales that are
    guided, from the second call of a kind on. It reads the weights where they are, and the numbers of
    guidance and filters from memory. `more_smooth` draws within the scales from the caller's generator,
    whose state a graph would replay, and so stays outside.

    Args:
        model: of VAR's class, with a `VectorQuantizer2` of this package in its `vae_quant_proxy`.
        dtype: of blocks and classifier; None for autocast's where that is on, else the weights' own.
        cuda_graphs: False leaves out the graphs.
    """

    def __init__(self, model: Any, dtype: torch.dtype | None, cuda_graphs: bool = True) -> None:
        self.model, self.dtype, self.cuda_graphs = model, dtype, cuda_graphs
        self._graphs = Graphs(self._latent)

    def of(self, model: Any) -> VarSampler:
        """One with the same options for another model."""
        return VarSampler(model, self.dtype, self.cuda_graphs)

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
        dtype = self.dtype or autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            f_hat = self._sampled(labels, dtype, cfg, top_k, top_p, generator, more_smooth)
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

    def _sampled(
        self,
        labels: Tensor,
        dtype: torch.dtype | None,
        cfg: float,
        top_k: int,
        top_p: float,
        generator: torch.Generator | None,
        more_smooth: bool,
    ) -> Tensor:
        """The sum of all scales, `(B, Cvae, H, W)`, by a graph or not."""
        quantizer: VectorQuantizer2 = self.model.vae_quant_proxy[0]
        scales, device = quantizer.pyramid.scales, labels.device
        options = SamplingOptions(abs(cfg), top_k=max(top_k, 0), top_p=min(max(top_p, 0.0), 1.0))
        plan = options.plan(len(scales), len(scales))
        if cfg < 0:
            plan = plan._replace(strengths=tuple(-strength for strength in plan.strengths))
        dtype = dtype or self.model.head.weight.dtype
        if more_smooth:
            codebook = quantizer.bank().codebook

            def smooth(head: Classifier, rows: Tensor, step: int) -> Tensor:
                logits = guided_logits(
                    head.logits(rows).unflatten(0, (-1, len(labels))), plan.strengths[step]
                )
                ratio = step / max(len(scales) - 1, 1)
                return mixtures(logits, codebook, ratio=ratio, top_k=top_k, top_p=top_p, generator=generator)

            return self._walk(labels, plan, _Weights.of(self.model, dtype), smooth)
        states = plan.states(device, generator)
        if self.cuda_graphs and has_values(labels):
            read = [*self.model.parameters(), self.model.lvl_1L, *quantizer.parameters()]
            given = labels, states, plan.settings(device)
            return self._graphs(given, plan.kind, dtype, scales, quantizer.phi_ratio, read)[0]
        return self._latent(labels, states, None, plan, dtype)[0]

    def _latent(
        self,
        labels: Tensor,
        states: Tensor | None,
        settings: Tensor | None,
        plan: SamplingPlan,
        dtype: torch.dtype,
        *_read: Any,
    ) -> tuple[Tensor]:
        """The sum of all scales, `(B, Cvae, H, W)`, of codes; waits for nothing on the device.

        For `states` and `settings` see `SamplingPlan.draw`. What else is read follows, for the
        graphs to know it by.
        """

        def choose(head: Classifier, rows: Tensor, step: int) -> Tensor:
            return head.codes(rows, plan, states, step, settings)

        return (self._walk(labels, plan, _Weights.of(self.model, dtype), choose),)

    def _walk(
        self,
        labels: Tensor,
        plan: SamplingPlan,
        weights: _Weights,
        choose: Callable[[Classifier, Tensor, int], Tensor],
    ) -> Tensor:
        """The sum of all scales; `choose` takes classifier, rows and number of a scale."""
        model, B, head = self.model, len(labels), weights.head
        quantizer: VectorQuantizer2 = model.vae_quant_proxy[0]
        pyramid = quantizer.pyramid
        if plan.guided_steps:
            labels = torch.cat([labels, torch.full_like(labels, model.num_classes)])
        condition: Tensor = model.class_emb(labels)
        places = (model.lvl_embed(model.lvl_1L) + model.pos_1LC).split(pyramid.lengths, dim=1)
        walk = ReconstructionWalk([quantizer.bank().by_taps()], pyramid, B)

        def embed(step: int, inputs: Tensor | None) -> Tensor:
            if inputs is None:
                rows = condition[:, None] + model.pos_start
            else:
                rows = model.word_embed(inputs.flatten(2).transpose(1, 2).to(condition.dtype))
            embedded: Tensor = (rows + places[step]).to(head.weight.dtype)
            return embedded

        sample_scales(
            plan,
            weights.body,
            pyramid.lengths,
            modulation=self._modulation(condition),
            head_modulation=torch.stack(model.head_nm.ada_lin(condition).chunk(2, dim=-1)),
            head_eps=model.head_nm.ln_wo_grad.eps,
            embed=embed,
            choose=lambda step, rows: choose(head, rows, step),
            feed=walk.advance,
        )
        return walk.finished[-1].to(condition.dtype)

    def _modulation(self, condition: Tensor) -> Tensor:
        """What AdaLN does in each block, `(blocks, 6, B, C)`: gates, scales and shifts, in VAR's order."""
        model, shape = self.model, (-1, 6, condition.shape[1])
        shared = model.shared_ada_lin(condition)
        rows = [
            (block.ada_gss + shared if block.shared_aln else block.ada_lin(condition)).reshape(shape)
            for block in model.blocks
        ]
        return torch.stack(rows).transpose(1, 2).contiguous()
