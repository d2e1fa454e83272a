"""`HitVar`: tokenizer and transformer together; one autoregressive pass from LR tiles to x1, x2 and x4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hitsr_fast.models.base import Model, register
from hitsr_fast.models.hit_var.config import HitConfig
from hitsr_fast.models.hit_var.sampler import HitSampler
from hitsr_fast.models.hit_var.tokenizer import HitTokenizer, enlarged
from hitsr_fast.models.hit_var.transformer import HitTransformer
from hitsr_fast.models.hit_var.upscaler import HitUpscaler


@register
class HitVar(Model):
    """HIT-VAR (arXiv 2506.04990): all target sizes by one pass of next-scale prediction."""

    config_class = HitConfig
    config: HitConfig

    def __init__(self, config: HitConfig) -> None:
        super().__init__(config)
        self.tokenizer = HitTokenizer(config.tokenizer)
        self.transformer = HitTransformer(config)

    def forward(self, lr: Tensor, class_id: Tensor, tokens: Tensor) -> Tensor:
        """Logits of all tokens of images under teacher forcing, given the images' LR versions.

        Args:
            lr: `(B, 3, t, t)` floating in [-1, 1] with `t = config.lr_tile`, in any dtype: all is computed in
                that of the weights.
            class_id: `(B,)` int64, see `HitTransformer.forward`.
            tokens: `(B, T)` int64 from `HitTokenizer.tokenize`.

        Returns:
            `(B, T, K)` float32 logits.
        """
        inputs = self.tokenizer.quantize.teacher_inputs(tokens, ar_grid=self.config.transformer.ar_grid)
        logits: Tensor = self.transformer(self.lr_features(lr), class_id, inputs)
        return logits

    def lr_features(self, lr: Tensor) -> Tensor:
        """Latent `(B, C, h, w)` of LR tiles `(B, 3, t, t)` brought to the full side (HIT-VAR, 4.1)."""
        return self.tokenizer.encode(self.lr_image(lr, len(self.config.tokenizer.targets) - 1))

    def lr_image(self, lr: Tensor, target: int) -> Tensor:
        """LR tiles `(B, 3, t, t)` at the side of target number `target`, in the weights' dtype."""
        return enlarged(lr, self.config.tokenizer, target).to(self.tokenizer.dtype)

    def decode(self, latents: Sequence[Tensor], target: int, lr: Tensor) -> Tensor:
        """Image `(B, 3, side, side)`, not clamped, of target number `target`.

        Args:
            latents: `(B, C, h, w)` a target, from `sample`.
            target: Number of the target, 0 the coarsest.
            lr: LR tiles `(B, 3, t, t)` in [-1, 1].
        """
        seen = self.lr_image(lr, target) if self.config.tokenizer.decoder_lr else None
        return self.tokenizer.decode(latents[target], target, seen)

    def sample(self, lr_features: Tensor, class_id: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
        """`HitSampler(self).sample(...)`: to sample often, keep the `HitSampler`."""
        return HitSampler(self).sample(lr_features, class_id, **options)

    def for_inference(self, dtype: torch.dtype | None = None, *, cuda_graphs: bool = True) -> HitUpscaler:
        """See `Model.for_inference`, and `HitSampler` for `cuda_graphs`."""
        return HitUpscaler(self, dtype=dtype, cuda_graphs=cuda_graphs)
