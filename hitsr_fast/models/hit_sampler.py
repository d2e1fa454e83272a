"""`HitSampler`: HIT-VAR's pyramid of tokens, drawn scale by scale with nothing left to launch in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from hitsr_fast.nn.cached_body import CachedBody, KVCache, modulation_table
from hitsr_fast.nn.quantizer import MultiScaleQuantizer, ReconstructionWalk
from hitsr_fast.nn.sampling import SamplingPlan, sampling_plan
from hitsr_fast.ops import modulated_layer_norm
from hitsr_fast.ops.cuda_graphs import Graphs, capturing

if TYPE_CHECKING:
    from hitsr_fast.models.hit_var import HitVar


_CACHED_LOGITS = 2**21  # 8 MiB, which a CPU's caches hold beside the weights


class HitSampler(nn.Module):
    """The transformer of a `HitVar` and its quantizer, laid out for sampling.

    Weights are held once, and shared with the model where the dtype is its own: those of the blocks in
    `dtype`, the rest, and what passes from block to block, in float32 at least. AdaLN, which depends on the
    class alone, is a table of three rows; level and position embeddings are added up beforehand. All shapes
    are static. On a GPU the steps, the draws and the inputs in between are one CUDA graph for each
    batch size and plan; the first call of a kind runs as it is.

    Args:
        model: Whose weights to take. Later changes of them may or may not be seen: make a new sampler.
        dtype: Of the blocks' products and of the cache, floating; by default the model's.
        cuda_graphs: False leaves out the graphs.

    Raises:
        TypeError: If `dtype` is not floating.
    """

    class_vectors: Tensor
    prefix_place: Tensor
    prefix_weight: Tensor
    prefix_bias: Tensor
    word_weight: Tensor
    word_bias: Tensor
    head_weight: Tensor
    head_bias: Tensor
    places: Tensor
    modulation: Tensor
    head_modulation: Tensor

    def __init__(self, model: HitVar, *, dtype: torch.dtype | None = None, cuda_graphs: bool = True) -> None:
        super().__init__()
        transformer, self.config = model.transformer, model.config
        dtype = transformer.head.weight.dtype if dtype is None else dtype
        check_dtype("dtype", dtype, FLOATING)
        blocks: list[Any] = list(transformer.blocks)
        attention = blocks[0].attn
        self.body = CachedBody(blocks, attention.heads, attention.softmax_scale, dtype)
        with torch.no_grad():
            classes, levels = transformer.class_emb.weight, transformer.lvl_embed.weight
            places = [
                levels[step + 1] + transformer.positions(side)[0]
                for step, side in enumerate(transformer.scales)
            ]
            places[0] = places[0] + transformer.pos_start[0]
            tensors = {
                "class_vectors": classes,
                "prefix_place": levels[0] + transformer.positions(self.config.tokenizer.latent_size)[0],
                "prefix_weight": transformer.prefix_embed.weight,
                "prefix_bias": transformer.prefix_embed.bias,
                "word_weight": transformer.word_embed.weight,
                "word_bias": transformer.word_embed.bias,
                "places": torch.cat(places),
                "head_weight": transformer.head.weight,
                "head_bias": transformer.head.bias,
                "modulation": modulation_table([block.ada_lin for block in blocks], classes),
                "head_modulation": modulation_table([transformer.head_nm.ada_lin], classes)[0],
            }
            # What is outside the blocks is small, and decides between codes: in float32 at least.
            wide = torch.promote_types(transformer.head.weight.dtype, torch.float32)
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor.detach().to(wide), persistent=False)
        self.quantizer = MultiScaleQuantizer(self.config.tokenizer)
        for name, parameter in model.tokenizer.quantize.named_parameters():
            value = nn.Parameter(parameter.detach().to(wide), requires_grad=False)
            setattr(self.quantizer, name, value)
        self._lengths = [side * side for side in transformer.scales]
        self._cached_rows = max(_CACHED_LOGITS // transformer.head.out_features, 1)
        self._cuda_graphs = cuda_graphs
        self._graphs = Graphs(self._walk)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HitSampler:
        """As of `nn.Module`; the graphs are forgotten, for they read the weights at their old addresses."""
        self._graphs = Graphs(self._walk)
        applied: HitSampler = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    @torch.no_grad()
    def sample(
        self,
        lr_features: Tensor,
        class_id: Tensor,
        *,
        targets: int | None = None,
        guidance: float = 0.0,
        guided_scales: Sequence[int] | None = None,
        top_k: int = 1,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Sample the token pyramid.

        Args:
            lr_features: `(B, C, h, w)` from `HitVar.lr_features`, floating.
            class_id: `(B,)` int64: 0 degraded, 1 clean, 2 neither. Checked where it is on a CPU.
            targets: Stop after this many targets, coarsest first; all by default.
            guidance: Classifier-free guidance at the last scale, rising linearly from 0 at the first (VAR); 0
                runs one branch only.
            guided_scales: Numbers of the scales that are guided; all by default. From the last of them on one
                branch runs.
            top_k: Keep the k largest logits; 1 is greedy, 0 keeps all.
            top_p: Then keep the likeliest codes of that total probability.
            generator: Source of randomness; unused when greedy.

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
        check_tensor("lr_features", lr_features, FLOATING, like=self.places)
        check_shape("lr_features", lr_features, "B C h w", C=tokenizer.code_dim, h=size, w=size)
        check_tensor("class_id", class_id, INDEX, like=lr_features)
        check_shape("class_id", class_id, "B", B=len(lr_features))
        if has_values(class_id):
            check_index_range("class_id", class_id, self.config.transformer.num_classes)
        last = len(tokenizer.targets) if targets is None else targets
        check_integer("targets", last, 1, len(tokenizer.targets))
        plan = sampling_plan(
            len(tokenizer.scales),
            tokenizer.target_steps[last - 1],
            guidance=guidance,
            guided_scales=guided_scales,
            top_k=top_k,
            top_p=top_p,
        )
        given = (lr_features, class_id, plan.states(lr_features.device, generator))
        graphed = self._cuda_graphs and lr_features.is_cuda and has_values(lr_features) and not capturing()
        with torch.autocast(lr_features.device.type, enabled=False):
            tokens, *latents = (self._graphs if graphed else _unpacked(self._walk))(given, plan)
        return tokens, latents

    def _walk(
        self, lr_features: Tensor, class_id: Tensor, states: Tensor | None, plan: SamplingPlan
    ) -> tuple[Tensor, ...]:
        """Tokens and latents; waits for nothing on the device."""
        batch, features = len(class_id), lr_features.to(self.places.dtype)
        prefix = self.config.tokenizer.latent_size**2
        steps, guided = len(plan.strengths), plan.guided_steps
        walk = ReconstructionWalk(self.quantizer, batch, ar_grid=self.config.transformer.ar_grid)
        classes = class_id
        if guided:
            free = torch.full_like(class_id, self.config.transformer.num_classes - 1)
            classes, features = torch.cat([class_id, free]), torch.cat([features, features])
        modulation, head_modulation = self.modulation[:, :, classes], self.head_modulation[:, classes]
        cache = self.body.new_cache(len(classes), prefix + sum(self._lengths[:steps]))
        start = 0
        pooled: Tensor | None = None
        tokens = []
        doubt = torch.zeros(batch, dtype=features.dtype, device=features.device)
        for step in range(steps):
            if step == guided and guided:  # no later scale is guided: the class-free branch ends here
                features, cache = features[:batch], cache.first(batch)
                modulation, head_modulation = modulation[:, :, :batch], head_modulation[:, :batch]
            x = self._embed(step, pooled, features, classes)
            length = x.shape[1]
            x = self.body(x, modulation, cache, start)[:, -self._lengths[step] :]
            start += length
            seen = len(x) if plan.strengths[step] > 0 else batch
            rows = modulated_layer_norm(x[:seen], *head_modulation[:, :seen].unbind())
            # A layer norm makes a whole row NaN of one bad value: a channel tells, 0 times which is 0 or NaN.
            doubt = doubt + 0 * rows[..., 0].sum(1).view(-1, batch).sum(0)
            codes = self._codes(rows, plan, states, step).view(batch, -1)
            tokens.append(codes)
            pooled = walk.advance(codes)
        return torch.cat(tokens, 1), *(latent + doubt[:, None, None, None] for latent in walk.finished)

    @torch.no_grad()
    def step_logits(self, x: Tensor, class_id: Tensor, cache: KVCache, start: int, step: int) -> Tensor:
        """Blocks and classifier on the tokens of one scale, for programs that hold the cache themselves.

        Args:
            x: `(B, L, width)`, floating; of scale 0 after the prefix.
            class_id: `(B,)` int64.
            cache: From `body.new_cache`; rows from `start` on are written.
            start: Tokens before these.
            step: Number of the scale.

        Returns:
            `(B, scales[step] ** 2, K)` float32.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = self.body(x, self.modulation[:, :, class_id], cache, start)[:, -self._lengths[step] :]
            return self._logits(modulated_layer_norm(x, *self.head_modulation[:, class_id].unbind()))

    def load_state_dict(self, *_args: Any, **_options: Any) -> NoReturn:
        """Raises RuntimeError: weights are laid out once, from a `HitVar`."""
        raise RuntimeError("HitSampler: load weights into a HitVar and make a new HitSampler of it")

    @property
    def body_dtype(self) -> torch.dtype:
        """The dtype of the blocks' products and of the cache."""
        return self.body.dtype

    def _embed(self, step: int, pooled: Tensor | None, features: Tensor, classes: Tensor) -> Tensor:
        """Tokens of a scale, `(B, L, width)`; those of scale 0 after the prefix."""
        place = self.places.split(self._lengths)[step]
        if pooled is None:
            prefix = self._linear(features, self.prefix_weight, self.prefix_bias) + self.prefix_place
            start = self.class_vectors[classes][:, None] + place
            return torch.cat([prefix, self._inject(start, features, step)], 1)
        x = self._linear(pooled.to(features.dtype), self.word_weight, self.word_bias)
        if len(x) < len(features):
            x = torch.cat([x, x])
        return self._inject(x + place, features, step)

    def _inject(self, x: Tensor, features: Tensor, step: int) -> Tensor:
        if not self.config.transformer.prefix_injection:
            return x
        pooled = F.adaptive_avg_pool2d(features, self.config.tokenizer.scales[step])
        return x + self._linear(pooled, self.prefix_weight, self.prefix_bias)

    @staticmethod
    def _linear(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """A linear map of a map's cells: `(B, C, h, w)` -> `(B, h * w, width)`."""
        return F.linear(maps.flatten(2).transpose(1, 2), weight, bias)

    def _codes(self, rows: Tensor, plan: SamplingPlan, states: Tensor | None, step: int) -> Tensor:
        """Codes `(B L,)` of rows `(B, L, width)`, or `(2 B, L, width)` where the scale is guided."""
        branches = rows.flatten(0, 1).unflatten(0, (2 if plan.strengths[step] > 0 else 1, -1))
        # Greedy codes ask nothing of other rows: on a CPU in parts, whose logits stay in the cache.
        parts = branches.split(self._cached_rows, 1) if plan.top_k == 1 and rows.is_cpu else (branches,)
        return torch.cat([plan.draw(self._logits(part), states, step) for part in parts])

    def _logits(self, rows: Tensor) -> Tensor:
        """Classifier on rows `(..., width)`: `(..., K)` float32.

        In float32 throughout: rounded to bfloat16, one in fifty of a row's largest logits is another's.
        """
        return F.linear(rows, self.head_weight, self.head_bias).float()


def _unpacked(launch: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda given, *rest: launch(*given, *rest)
