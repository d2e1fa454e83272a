"""`HitVar`: tokenizer and transformer together; one autoregressive pass from LR tiles to x1, x2 and x4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from hitsr_fast.models.checkpoints import load_state
from hitsr_fast.models.config import HitConfig
from hitsr_fast.models.hit_tokenizer import HitTokenizer
from hitsr_fast.models.hit_transformer import HitTransformer
from hitsr_fast.nn.autoencoder import resize
from hitsr_fast.nn.quantizer import ReconstructionWalk
from hitsr_fast.nn.sampling import sample_codes

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
        """LR tiles `(B, 3, t, t)` at the side of target number `target`, bilinear, in the weights' dtype."""
        config = self.config.tokenizer
        side = config.target_sizes[target] * config.stride
        # Enlarged in the images' own dtype: the antialiased filter has no 16-bit version on the CPU.
        return resize(lr, (side, side), "bilinear").to(self.tokenizer.quant_conv.weight.dtype)

    def decode(self, latents: Sequence[Tensor], target: int, lr: Tensor) -> Tensor:
        """Image `(B, 3, side, side)`, not clamped, of target number `target`.

        Args:
            latents: `(B, C, h, w)` a target, from `sample`.
            target: Number of the target, 0 the coarsest.
            lr: LR tiles `(B, 3, t, t)` in [-1, 1].
        """
        seen = self.lr_image(lr, target) if self.config.tokenizer.decoder_lr else None
        return self.tokenizer.decode(latents[target].to(self.tokenizer.quant_conv.weight.dtype), target, seen)

    @torch.no_grad()
    def sample(
        self,
        lr_features: Tensor,
        class_id: Tensor,
        *,
        targets: int | None = None,
        guidance: float = 0.0,
        top_k: int = 1,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Sample the token pyramid scale by scale, with KV caches.

        Args:
            lr_features: `(B, C, h, w)` from `lr_features`.
            class_id: `(B,)` int64: 0 degraded, 1 clean.
            targets: Stop after this many targets, coarsest first; all by default.
            guidance: Classifier-free guidance at the last scale, rising linearly from 0 at the first (VAR); 0
                runs one branch only.
            top_k: See `sample_codes`.
            top_p: See `sample_codes`.
            generator: See `sample_codes`.

        Returns:
            Tokens `(B, T)` int64, and the latent `(B, C, h, w)` of each finished target.
        """
        transformer, config = self.transformer, self.config
        batch = lr_features.shape[0]
        if guidance > 0:
            free = torch.full_like(class_id, config.transformer.num_classes - 1)
            class_id = torch.cat([class_id, free])
            lr_features = torch.cat([lr_features, lr_features])
        condition = transformer.class_emb(class_id)
        caches = transformer.new_caches(len(class_id), condition.dtype)
        walk = ReconstructionWalk(self.tokenizer.quantize, batch, ar_grid=config.transformer.ar_grid)
        steps = config.tokenizer.target_steps[(targets or len(config.tokenizer.targets)) - 1]
        inputs: Tensor | None = None
        tokens = []
        for step in range(steps):
            if inputs is not None:
                inputs = inputs.to(condition.dtype)
                inputs = torch.cat([inputs, inputs]) if guidance > 0 else inputs
            logits = transformer.step(step, inputs, lr_features, condition, caches)
            indices = sample_codes(
                logits[:batch],
                uncond_logits=logits[batch:] if guidance > 0 else None,
                guidance=guidance * step / max(len(config.tokenizer.scales) - 1, 1),
                top_k=top_k,
                top_p=top_p,
                generator=generator,
            )
            tokens.append(indices)
            inputs = walk.advance(indices)
        return torch.cat(tokens, 1), walk.finished

    @torch.no_grad()
    def super_resolve(
        self,
        lr: Tensor,
        *,
        class_id: int = 0,
        factors: Sequence[int] | None = None,
        guidance: float = 0.0,
        top_k: int = 1,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> dict[int, Tensor]:
        """Restore and enlarge LR tiles.

        Args:
            lr: `(B, 3, t, t)` in [-1, 1] with `t = lr_tile`.
            class_id: 0 for degraded input, 1 for clean bilinear or bicubic input.
            factors: Wanted factors, out of `scale_factors`; all by default. Steps that no wanted factor needs
                are not run.
            guidance: See `sample`.
            top_k: See `sample_codes`.
            top_p: See `sample_codes`.
            generator: See `sample_codes`.

        Returns:
            `{factor: (B, 3, factor * t, factor * t)}` in [-1, 1].

        Raises:
            ValueError: If the tile has the wrong side or a factor is not on offer.
        """
        if lr.ndim != 4 or tuple(lr.shape[1:]) != (3, self.lr_tile, self.lr_tile):
            raise ValueError(f"lr: expected (B, 3, {self.lr_tile}, {self.lr_tile}), got {tuple(lr.shape)}")
        wanted = self.scale_factors if factors is None else tuple(factors)
        if not wanted or any(factor not in self.scale_factors for factor in wanted):
            raise ValueError(f"factors: expected some of {self.scale_factors}, got {wanted}")
        numbers = {factor: self.scale_factors.index(factor) for factor in wanted}
        features = self.lr_features(lr)
        classes = torch.full((len(lr),), class_id, dtype=torch.int64, device=lr.device)
        _, latents = self.sample(
            features,
            classes,
            targets=max(numbers.values()) + 1,
            guidance=guidance,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )
        return {
            factor: self.decode(latents, number, lr).float().clamp(-1, 1)
            for factor, number in numbers.items()
        }


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
