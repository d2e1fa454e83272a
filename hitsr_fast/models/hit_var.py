"""`HitVar`: tokenizer and transformer together; one autoregressive pass from LR tiles to x1, x2 and x4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hitsr_fast.models.checkpoints import load_state
from hitsr_fast.models.config import HitConfig
from hitsr_fast.models.hit_sampler import HitSampler
from hitsr_fast.models.hit_tokenizer import HitTokenizer, enlarged
from hitsr_fast.models.hit_transformer import HitTransformer
from hitsr_fast.models.hit_upscaler import HitUpscaler

SCALE = 4  # LR side to full side; the paper trains x4 only


class HitVar(nn.Module):
    """HIT-VAR (arXiv 2506.04990): all target sizes by one pass of next-scale prediction."""

    def __init__(self, config: HitConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = HitTokenizer(config.tokenizer)
        self.transformer = HitTransformer(config)

    @property
    def lr_tile(self) -> int:
        """Side in pixels of the LR tile that the model takes."""
        return self.config.tokenizer.image_size // SCALE

    @property
    def scale_factors(self) -> tuple[int, ...]:
        """Output side over LR side of each target: (1, 2, 4) for targets (1/4, 1/2, 1)."""
        return tuple(round(SCALE * target) for target in self.config.tokenizer.targets)

    def lr_features(self, lr: Tensor) -> Tensor:
        """Latent `(B, C, h, w)` of LR tiles `(B, 3, t, t)` brought to the full side (HIT-VAR, 4.1)."""
        return self.tokenizer.encode(self.lr_image(lr, len(self.config.tokenizer.targets) - 1))

    def lr_image(self, lr: Tensor, target: int) -> Tensor:
        """LR tiles `(B, 3, t, t)` at the side of target number `target`, in the weights' dtype."""
        return enlarged(lr, self.config.tokenizer, target).to(self.tokenizer.quant_conv.weight.dtype)

    def decode(self, latents: Sequence[Tensor], target: int, lr: Tensor) -> Tensor:
        """Image `(B, 3, side, side)`, not clamped, of target number `target`.

        Args:
            latents: `(B, C, h, w)` a target, from `sample`.
            target: Number of the target, 0 the coarsest.
            lr: LR tiles `(B, 3, t, t)` in [-1, 1].
        """
        seen = self.lr_image(lr, target) if self.config.tokenizer.decoder_lr else None
        return self.tokenizer.decode(latents[target].to(self.tokenizer.quant_conv.weight.dtype), target, seen)

    def sample(self, lr_features: Tensor, class_id: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
        """`HitSampler(self).sample(...)`: to sample often, keep the `HitSampler`."""
        return HitSampler(self).sample(lr_features, class_id, **options)

    def super_resolve(self, lr: Tensor, **options: Any) -> dict[int, Tensor]:
        """`HitUpscaler(self).super_resolve(...)`: to upscale often, keep the `HitUpscaler`."""
        return HitUpscaler(self).super_resolve(lr, **options)


def save_pretrained(model: HitVar, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write `config.json` and `model.safetensors`, floating weights as `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().to(dtype).contiguous() for key, value in model.state_dict().items()}
    temporary = folder / "model.safetensors.tmp"
    temporary.write_bytes(save(state))
    temporary.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(model.config.to_json())


def load_pretrained(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> HitVar:
    """Read a model that `save_pretrained` wrote.

    Raises:
        FileNotFoundError: If a file is missing.
        CheckpointError: If keys are missing, unexpected or mis-shaped; the message names them.
    """
    config = HitConfig.load(folder / "config.json")
    model = HitVar(config)
    state = load_file(folder / "model.safetensors")
    load_state(model, {key: value.float() for key, value in state.items()}, str(folder / "model.safetensors"))
    return model.to(device=device, dtype=dtype).eval()
