"""`HitUpscaler`: a `HitVar` laid out for inference; LR tiles in, an image of each target out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hitsr_fast.checks import FLOATING, check_choice, check_shape, check_tensor
from hitsr_fast.models.base import INPUTS, Input, listed_factors
from hitsr_fast.models.hit_var.sampler import HitSampler
from hitsr_fast.models.hit_var.tokenizer import enlarged
from hitsr_fast.nn.inference import for_inference
from hitsr_fast.nn.sampling import SamplingOptions, check_sampling

if TYPE_CHECKING:
    from hitsr_fast.models.hit_var.model import HitVar


class HitUpscaler:
    """Encoder, sampler and decoders of HIT-VAR (arXiv 2506.04990) for inference.

    Encoder and decoders are copies, channels-last and with upsampling folded into its convolutions; only the
    decoders that are asked for run. The model itself is not needed any more.

    Args:
        model: Whose weights to take.
        dtype: To compute in; by default that of the model's weights.
        cuda_graphs: See `HitSampler`.
    """

    def __init__(self, model: HitVar, *, dtype: torch.dtype | None = None, cuda_graphs: bool = True) -> None:
        self.config, tokenizer = model.config, model.tokenizer
        self.lr_tile, self.scale_factors = self.config.lr_tile, self.config.scale_factors
        self.num_scales = len(self.config.tokenizer.scales)
        self.colour_fix_levels = dict(zip(self.scale_factors, self.config.colour_fix_levels, strict=True))
        dtype = tokenizer.dtype if dtype is None else dtype
        self.sampler = HitSampler(model, dtype=dtype, cuda_graphs=cuda_graphs)
        self.encoder = for_inference(nn.Sequential(tokenizer.encoder, tokenizer.quant_conv), dtype)
        self.decoders = [for_inference(decoder, dtype) for decoder in tokenizer.decoders]

    @torch.no_grad()
    def super_resolve(
        self,
        lr: Tensor,
        sampling: SamplingOptions = SamplingOptions(),  # noqa: B008  # frozen
        *,
        input: Input = "clean",
        factors: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[int, Tensor]:
        """See `SuperResolver.super_resolve`; steps that no wanted factor needs are not run.

        In the dtype of this upscaler, under autocast too.
        """
        check_tensor("lr", lr, FLOATING)
        check_shape("lr", lr, "B C h w", C=3, h=self.lr_tile, w=self.lr_tile)
        if len(lr) == 0:
            raise ValueError(f"lr: expected B of at least 1, found shape {tuple(lr.shape)}")
        check_sampling("sampling", sampling)
        check_choice("input", input, INPUTS)
        wanted = self.scale_factors if factors is None else listed_factors("factors", factors)
        if not wanted or any(factor not in self.scale_factors for factor in wanted):
            raise ValueError(f"factors: expected some of {self.scale_factors}, found {wanted}")
        targets = {factor: self.scale_factors.index(factor) for factor in wanted}
        _, latents = self.sampler.sample(
            self.lr_features(lr),
            torch.full((len(lr),), self._class_of(input), dtype=torch.int64, device=lr.device),
            sampling,
            targets=max(targets.values()) + 1,
            generator=generator,
        )
        return {factor: self.decode(latents[target], target, lr) for factor, target in targets.items()}

    def to(self, dtype: torch.dtype) -> HitUpscaler:
        """The same with weights in `dtype`; itself it stays as it is."""
        other = copy.copy(self)
        other.sampler = self.sampler.to(dtype)
        other.encoder = copy.deepcopy(self.encoder).to(dtype)
        other.decoders = [copy.deepcopy(decoder).to(dtype) for decoder in self.decoders]
        return other

    @torch.no_grad()
    def lr_features(self, lr: Tensor) -> Tensor:
        """Latent `(B, C, h, w)` of LR tiles `(B, 3, t, t)` brought to the full side (HIT-VAR, 4.1)."""
        with torch.autocast(lr.device.type, enabled=False):
            image = enlarged(lr, self.config.tokenizer, len(self.scale_factors) - 1)
            features: Tensor = self.encoder(self._channels_last(image))
        return features

    @torch.no_grad()
    def decode(self, latent: Tensor, target: int, lr: Tensor) -> Tensor:
        """Image `(B, 3, side, side)`, float32 in [-1, 1], of a target's latent `(B, C, h, w)`.

        Args:
            latent: From `HitSampler.sample`.
            target: Number of the target, 0 the coarsest.
            lr: The LR tiles, for decoders that look at them.
        """
        config, seen = self.config.tokenizer, None
        with torch.autocast(latent.device.type, enabled=False):
            if config.decoder_lr:
                seen = self._channels_last(enlarged(lr, config, target))
            image: Tensor = self.decoders[target](self._channels_last(latent), seen)
        return image.float().clamp(-1, 1)

    def _class_of(self, input: Input) -> int:
        """Row of the class embedding; the last one is the class-free one."""
        return self.config.transformer.num_classes - 1 if input == "unknown" else INPUTS.index(input)

    def _channels_last(self, x: Tensor) -> Tensor:
        return x.to(self.sampler.body_dtype, memory_format=torch.channels_last)
