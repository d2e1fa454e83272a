"""The whole training of a model, stage after stage, in one resumable run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from hitsr_fast.data.folder import DEFAULT_HOLDOUT, PhotoFolder, photo_names, split
from hitsr_fast.models.config import PRESETS, HitConfig
from hitsr_fast.models.hit_tokenizer import HitTokenizer
from hitsr_fast.models.hit_var import HitVar, save_pretrained
from hitsr_fast.train.autoencoder import AutoencoderConfig, AutoencoderStage
from hitsr_fast.train.batches import PairBatches
from hitsr_fast.train.codebook import fill_codebook
from hitsr_fast.train.decoder import DecoderStage, DecoderTrainConfig
from hitsr_fast.train.loop import LoopConfig, train
from hitsr_fast.train.tokenizer import TokenizerStage, TokenizerTrainConfig
from hitsr_fast.train.transformer import TransformerStage, TransformerTrainConfig

# The photos that the package shows, and their neighbours, are held out beside the default ones.
HOLDOUT = (
    *DEFAULT_HOLDOUT,
    "budgie-backgrounds__casa-mila",
    "budgie-backgrounds__oakland-zoo-otters",
    "budgie-backgrounds__perched-osprey",
    "budgie-backgrounds__tea-gardens",
)


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on beside the photos.

    Args:
        preset: Name of the model's preset.
        holdout: Stems of the photos that are never trained on.
        seed: Seed of the initial weights, the crops and the degradations.
        clean_prob: Share of clean bilinear pairs.
        codebook_images: Crops whose latents fill the codebook.
        autoencoder: Stage 0.
        autoencoder_loop: Its loop.
        tokenizer: Stage 1.
        tokenizer_loop: Its loop.
        transformer: Stage 2.
        transformer_loop: Its loop.
        decoder: Stage 3.
        decoder_loop: Its loop.
    """

    preset: str = "hit-tiny"
    holdout: tuple[str, ...] = HOLDOUT
    seed: int = 0
    clean_prob: float = 0.25
    codebook_images: int = 768
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    autoencoder_loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=1800))
    tokenizer: TokenizerTrainConfig = field(default_factory=lambda: TokenizerTrainConfig(train_encoder=True))
    tokenizer_loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=600))
    transformer: TransformerTrainConfig = field(default_factory=TransformerTrainConfig)
    transformer_loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=900))
    decoder: DecoderTrainConfig = field(default_factory=DecoderTrainConfig)
    decoder_loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=500))


def train_model(recipe: Recipe, photos: Path, folder: Path, device: torch.device | str = "cpu") -> HitVar:
    """Train all stages that are not yet done in `folder`, and write the model to `folder / "model"`.

    Args:
        recipe: What to train and how.
        photos: Folder of training photos.
        folder: Checkpoints and log; an interrupted run resumes from it.
        device: Where to train.
    """
    config = PRESETS[recipe.preset]
    torch.manual_seed(recipe.seed)
    model = HitVar(config).to(device)
    tokenizer: HitTokenizer = model.tokenizer
    for part in (tokenizer.encoder, tokenizer.quant_conv, tokenizer.decoders):
        part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches, held_out = pair_batches(recipe, config, photos, device)

    stage = AutoencoderStage(tokenizer, batches, held_out, recipe.autoencoder)
    adopt(tokenizer, train(stage, recipe.autoencoder_loop, folder))
    if not (folder / f"{TokenizerStage.name}.pt").exists():
        for decoder in tokenizer.decoders[1:]:
            decoder.load_state_dict(tokenizer.decoders[0].state_dict())
        print(fill_codebook(tokenizer.quantize, latent_sample(tokenizer, batches, recipe.codebook_images)))
    tokenizer_stage = TokenizerStage(tokenizer, batches, held_out, recipe.tokenizer)
    adopt(tokenizer, train(tokenizer_stage, recipe.tokenizer_loop, folder))
    transformer_stage = TransformerStage(model.transformer, tokenizer, batches, held_out, recipe.transformer)
    adopt(model.transformer, train(transformer_stage, recipe.transformer_loop, folder))
    decoder_stage = DecoderStage(model, batches, held_out, recipe.decoder)
    adopt(tokenizer, train(decoder_stage, recipe.decoder_loop, folder))
    save_pretrained(model.eval(), folder / "model")
    return model


def pair_batches(
    recipe: Recipe, config: HitConfig, photos: Path, device: torch.device | str
) -> tuple[PairBatches, PairBatches]:
    """Training and held-out batches, split by photo."""
    trained, held = split(photo_names(photos), recipe.holdout)
    crop = config.tokenizer.image_size

    def make(names: list[str], seed: int) -> PairBatches:
        return PairBatches(
            PhotoFolder(photos, crop, seed=seed, names=names),
            seed=seed,
            clean_prob=recipe.clean_prob,
            device=device,
        )

    return make(trained, recipe.seed), make(held, recipe.seed + 1)


@torch.no_grad()
def latent_sample(tokenizer: HitTokenizer, batches: PairBatches, images: int, size: int = 32) -> list[Tensor]:
    """Latents of the first `images` training crops at each target size."""
    levels: list[list[Tensor]] = [[] for _ in tokenizer.config.targets]
    for i in range(max(images // size, 1)):
        hr = batches(i, size)[0]
        for level, image in zip(levels, tokenizer.pyramid(hr), strict=True):
            with torch.autocast(image.device.type, torch.bfloat16):
                level.append(tokenizer.encode(image).float())
    return [torch.cat(level) for level in levels]


def adopt(model: nn.Module, averaged: nn.Module) -> None:
    """Take over the averaged weights of a finished stage."""
    model.load_state_dict(averaged.state_dict())
