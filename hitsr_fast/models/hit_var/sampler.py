"""`HitSampler`: HIT-VAR's pyramid of tokens, drawn scale by scale with nothing left to launch in between."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.checks import (
    FLOATING,
    INDEX,
    check_dtype,
    check_index_range,
    check_integer,
    check_shape,
    check_tensor,
    has_values,
)
from hitsr_fast.nn.bank import ReconstructionWalk
from hitsr_fast.nn.cached_body import CachedBody, modulation_table
from hitsr_fast.nn.sampling import Classifier, SamplingOptions, SamplingPlan, check_sampling, sample_scales
from hitsr_fast.ops.cuda_graphs import Graphs

if TYPE_CHECKING:
    from hitsr_fast.models.hit_var.model import HitVar


class HitSampler:
    """The transformer of a `HitVar` and its quantizer, laid out for sampling.

    Weights are held once, and shared with the model where the dtype is its own: those of the blocks in
    `dtype`, the rest, and what passes from block to block, in float32 at least. AdaLN, which depends on the
    class alone, is a table of three rows; level and position embeddings are added up beforehand. All shapes
    are static. On a GPU the steps, the draws and the inputs in between are one CUDA graph for each
    batch size, for the scales that are run and guided, and for greedy codes or drawn ones; the first call of
    a kind runs as it is. Guidance, top-k, top-p and temperature are read from memory: other values make no
    other graph.

    Args:
        model: Whose weights to take. Later changes of them may or may not be seen: make a new sampler.
        dtype: Of the blocks' products and of the cache, floating; by default the model's.
        cuda_graphs: False leaves out the graphs.

    Raises:
        TypeError: If `dtype` is not floating.
    """

    @torch.no_grad()
    def __init__(self, model: HitVar, *, dtype: torch.dtype | None = None, cuda_graphs: bool = True) -> None:
        transformer, self.config = model.transformer, model.config
        self.pyramid = self.config.tokenizer.pyramid
        own = transformer.head.weight.dtype
        dtype = own if dtype is None else dtype
        check_dtype("dtype", dtype, FLOATING)
        blocks: list[Any] = list(transformer.blocks)
        attention = blocks[0].attn
        self.body = CachedBody(blocks, attention.heads, attention.softmax_scale, dtype)
        classes, levels = transformer.class_emb.weight, transformer.lvl_embed.weight
        places = [
            levels[step + 1] + transformer.positions(side)[0] for step, side in enumerate(transformer.scales)
        ]
        places[0] = places[0] + transformer.pos_start[0]
        latent = transformer.positions(self.config.tokenizer.latent_size)[0]

        # What is outside the blocks is small, and decides between codes: in float32 at least.
        # Rounded to bfloat16, one in fifty of a row's largest logits is another's.
        def wide(*tensors: Tensor) -> list[Tensor]:
            return [tensor.detach().to(torch.promote_types(own, torch.float32)) for tensor in tensors]

        def linear(layer: torch.nn.Linear) -> tuple[Tensor, Tensor]:
            weight, bias = wide(layer.weight, layer.bias)
            return weight, bias

        self.places = wide(*places)
        self.class_vectors, self.prefix_place = wide(classes, levels[0] + latent)
        self.modulation, self.head_modulation = wide(
            modulation_table([block.ada_lin for block in blocks], classes),
            modulation_table([transformer.head_nm.ada_lin], classes)[0],
        )
        self.prefix_embed, self.word_embed = linear(transformer.prefix_embed), linear(transformer.word_embed)
        self.classifier = Classifier(*linear(transformer.head))
        self.banks = [bank.to(self.places[0].dtype).by_taps() for bank in model.tokenizer.quantize.banks()]
        self._cuda_graphs = cuda_graphs
        self._graphs = Graphs(self._walk)

    def to(self, dtype: torch.dtype) -> HitSampler:
        """The same with the blocks in another dtype."""
        other = copy.copy(self)
        other.body = self.body.to(dtype)
        other._graphs = Graphs(other._walk)
        return other

    @torch.no_grad()
    def sample(
        self,
        lr_features: Tensor,
        class_id: Tensor,
        options: SamplingOptions = SamplingOptions(),  # noqa: B008  # frozen
        *,
        targets: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Sample the token pyramid.

        Args:
            lr_features: `(B, C, h, w)` from `HitVar.lr_features`, floating.
            class_id: `(B,)` int64: 0 degraded, 1 clean, 2 neither. Checked where it is on a CPU.
            options: How codes are drawn.
            targets: Stop after this many targets, coarsest first; all by default.
            generator: Source of randomness in place of `options.seed`; unused when greedy.

        Returns:
            Tokens `(B, T)` int64, and the latent `(B, C, h, w)` of each finished target, float32. Where the
            blocks give NaN or infinity for an image, its latents are NaN.

        Raises:
            TypeError: If an argument is of another type or dtype.
            ValueError: If a shape does not fit or an option is out of its range.

        Notes:
            In the dtypes that were chosen, under autocast too.
        """
        tokenizer, size = self.config.tokenizer, self.config.tokenizer.latent_size
        check_tensor("lr_features", lr_features, FLOATING, like=self.places[0])
        check_shape("lr_features", lr_features, "B C h w", C=tokenizer.code_dim, h=size, w=size)
        check_tensor("class_id", class_id, INDEX, like=lr_features)
        check_shape("class_id", class_id, "B", B=len(lr_features))
        if has_values(class_id):
            check_index_range("class_id", class_id, self.config.transformer.num_classes)
        last = len(tokenizer.targets) if targets is None else targets
        check_sampling("options", options)
        check_integer("targets", last, 1, len(tokenizer.targets))
        plan = options.plan(len(self.pyramid.scales), self.pyramid.steps[last - 1])
        if generator is None:
            generator = options.generator(lr_features.device)
        device = lr_features.device
        given = (lr_features, class_id, plan.states(device, generator))
        with torch.autocast(device.type, enabled=False):
            if self._cuda_graphs and has_values(lr_features):
                tokens, *latents = self._graphs((*given, plan.settings(device)), plan.kind)
            else:
                tokens, *latents = self._walk(*given, None, plan)
        return tokens, latents

    def _walk(
        self,
        lr_features: Tensor,
        class_id: Tensor,
        states: Tensor | None,
        settings: Tensor | None,
        plan: SamplingPlan,
    ) -> tuple[Tensor, ...]:
        """Tokens and latents; waits for nothing on the device. For `settings` see `SamplingPlan.draw`."""
        batch, features = len(class_id), lr_features.to(self.prefix_place.dtype)
        classes = class_id
        if plan.guided_steps:
            free = torch.full_like(class_id, self.config.transformer.num_classes - 1)
            classes = torch.cat([class_id, free])
        walk = ReconstructionWalk(self.banks, self.pyramid, batch, ar_grid=self.config.transformer.ar_grid)
        doubt = []

        def embed(step: int, inputs: Tensor | None) -> Tensor:
            return self._embed(step, inputs, features, classes)

        def choose(step: int, rows: Tensor) -> Tensor:
            # A layer norm makes a whole row NaN of one bad value: a channel tells, 0 times which is 0 or NaN.
            doubt.append(0 * rows[..., 0].sum(1).view(-1, batch).sum(0))
            return self.classifier.codes(rows, plan, states, step, settings)

        tokens = sample_scales(
            plan,
            self.body,
            self.pyramid.lengths,
            prefix=len(self.prefix_place),
            modulation=self.modulation[:, :, classes],
            head_modulation=self.head_modulation[:, classes],
            embed=embed,
            choose=choose,
            feed=walk.advance,
        )
        doubted = torch.stack(doubt).sum(0)[:, None, None, None]
        return torch.cat(tokens, 1), *(latent + doubted for latent in walk.finished)

    @property
    def body_dtype(self) -> torch.dtype:
        """The dtype of the blocks' products and of the cache."""
        return self.body.dtype

    def _embed(self, step: int, inputs: Tensor | None, features: Tensor, classes: Tensor) -> Tensor:
        """Tokens of a scale, `(B, L, width)`; those of scale 0 after the prefix, and for all classes."""
        if inputs is not None:
            x = _linear(inputs.to(features.dtype), self.word_embed)
            return self._injected(x + self.places[step], features, step)
        prefix = _linear(features, self.prefix_embed) + self.prefix_place
        prefix, features = (torch.cat([t] * (len(classes) // len(t))) for t in (prefix, features))
        start = self.class_vectors[classes][:, None] + self.places[step]
        return torch.cat([prefix, self._injected(start, features, step)], 1)

    def _injected(self, x: Tensor, features: Tensor, step: int) -> Tensor:
        if not self.config.transformer.prefix_injection:
            return x
        return x + _linear(F.adaptive_avg_pool2d(features, self.pyramid.sizes[step]), self.prefix_embed)


def _linear(maps: Tensor, layer: tuple[Tensor, Tensor]) -> Tensor:
    """A linear map of a map's cells: `(B, C, h, w)` -> `(B, h * w, width)`."""
    return F.linear(maps.flatten(2).transpose(1, 2), *layer)
