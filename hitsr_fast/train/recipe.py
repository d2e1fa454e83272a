"""The whole training of a model, stage after stage, in one resumable run."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hitsr_fast.data.folder import DEFAULT_HOLDOUT, NoPhotosError, PhotoFolder, photo_names, split
from hitsr_fast.metrics.lpips_weights import require_weights, weights_path
from hitsr_fast.models import PRESETS, HitConfig, HitTokenizer, HitVar
from hitsr_fast.train.autoencoder import AutoencoderStage
from hitsr_fast.train.batches import PairBatches
from hitsr_fast.train.codebook import fill_codebook
from hitsr_fast.train.config import LoopConfig, Recipe
from hitsr_fast.train.decoder import DecoderStage
from hitsr_fast.train.linear_start import start_linear
from hitsr_fast.train.loop import train
from hitsr_fast.train.stage import Stage
from hitsr_fast.train.tokenizer import TokenizerStage
from hitsr_fast.train.transformer import TransformerStage

# The photos that the package shows, and their neighbours, are held out beside the default ones.
HOLDOUT = (
    *DEFAULT_HOLDOUT,
    "budgie-backgrounds__casa-mila",
    "budgie-backgrounds__oakland-zoo-otters",
    "budgie-backgrounds__perched-osprey",
    "budgie-backgrounds__tea-gardens",
)


def train_model(recipe: Recipe, photos: Path, folder: Path, device: torch.device | str = "cpu") -> HitVar:
    """Train all stages that are not yet done in `folder`, and write the model to `folder / "model"`.

    The folder keeps checkpoints and log; an interrupted run resumes from it. `photos` is that of the training
    photos. The trained model comes back in evaluation mode.

    Raises:
        ValueError: The preset is unknown or has too few codes, or no photo is held out.
        NoPhotosError: No photo is left to train on, or the photos of a part are smaller than a crop.
        ResumeError: `folder` has a checkpoint of another model or recipe.
        LpipsWeightsNotFoundError: A loss has a perceptual part, and its weights were not fetched.
        FloatingPointError: A loss is not finite; the last checkpoint is from before that step.
    """
    config = model_config(recipe)
    if any(loss.alex > 0 or loss.vgg > 0 for loss in recipe.losses):
        require_weights(weights_path())  # now, not hours later at the first stage that needs them
    torch.manual_seed(recipe.seed)
    model = HitVar(config).to(device)
    tokenizer: HitTokenizer = model.tokenizer
    for part in (tokenizer.encoder, tokenizer.quant_conv, tokenizer.decoders):
        part.to(memory_format=torch.channels_last)
    batches, held_out = pair_batches(recipe, config, photos, device)

    def finish(stage: Stage[Any], loop: LoopConfig) -> nn.Module:
        return train(stage, loop, folder, made_with(recipe, stage.name))

    if config.tokenizer.linear_skip:
        print("variance kept by the linear start:", start_linear(tokenizer, image_sample(tokenizer, batches)))
    stage = AutoencoderStage(tokenizer, batches, held_out, recipe.autoencoder)
    adopt(tokenizer, finish(stage, recipe.autoencoder_loop))
    if not (folder / f"{TokenizerStage.name}.pt").exists():
        for decoder in tokenizer.decoders[1:]:
            decoder.load_state_dict(tokenizer.decoders[0].state_dict())
        print(fill_codebook(tokenizer.quantize, latent_sample(stage, recipe.codebook_images)))
    tokenizer_stage = TokenizerStage(tokenizer, batches, held_out, recipe.tokenizer)
    adopt(tokenizer, finish(tokenizer_stage, recipe.tokenizer_loop))
    transformer_stage = TransformerStage(model.transformer, tokenizer, batches, held_out, recipe.transformer)
    adopt(model.transformer, finish(transformer_stage, recipe.transformer_loop))
    decoder_stage = DecoderStage(model, batches, held_out, recipe.decoder)
    adopt(tokenizer, finish(decoder_stage, recipe.decoder_loop))
    copy.deepcopy(model.eval()).half().save_pretrained(folder / "model")
    return model


def model_config(recipe: Recipe) -> HitConfig:
    """The configuration of the recipe's preset; raises `ValueError` if it is unknown or has too few codes."""
    if recipe.preset not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, found {recipe.preset!r}")
    config = PRESETS[recipe.preset]
    codes = config.tokenizer.codebook_size
    if recipe.transformer.mistake_codes >= codes:
        found = recipe.transformer.mistake_codes
        raise ValueError(f"mistake_codes: expected fewer than the {codes} codes of the preset, found {found}")
    return config


# Values that change how long or how quickly a stage is trained, not what it learns in a step.
_FREE_ON_RESUME = frozenset(("steps", "minutes", "checkpoint_minutes", "log_every", "eval_every", "compile"))


def made_with(recipe: Recipe, stage: str) -> dict[str, Any]:
    """All values that the outcome of a stage, by its name, depends on: a resumed run must have the same.

    They are JSON values by name, in nested dicts; the preset with all of the model's configuration.
    """
    values = asdict(recipe)
    parts = {
        part: {name: value for name, value in values[part].items() if name not in _FREE_ON_RESUME}
        for part in (stage, f"{stage}_loop")
    }
    shared = {name: values[name] for name in ("preset", "holdout", "seed", "clean_prob", "codebook_images")}
    return {**shared, **parts, "model": asdict(model_config(recipe))}


def photo_split(recipe: Recipe, photos: Path) -> tuple[list[str], list[str]]:
    """Split the names of the photos into those to train on and those held out.

    Raises:
        ValueError: If `photos` is no folder, or none are held out.
        NoPhotosError: If there are none at all, or none to train on.
    """
    names = photo_names(photos)
    if not names:
        raise NoPhotosError(f"photos: expected a folder with image files, found none in {str(photos)!r}")
    trained, held = split(names, HOLDOUT if recipe.holdout is None else recipe.holdout)
    if not trained:
        raise NoPhotosError(f"holdout: expected photos left to train on, found all {len(held)} held out")
    return trained, held


def pair_batches(
    recipe: Recipe, config: HitConfig, photos: Path, device: torch.device | str
) -> tuple[PairBatches, PairBatches]:
    """Training and held-out batches, split by photo."""
    trained, held = photo_split(recipe, photos)
    crop = config.tokenizer.image_size

    def make(names: list[str], seed: int) -> PairBatches:
        folder = PhotoFolder(photos, crop, seed=seed, names=names)
        return PairBatches(folder, seed=seed, clean_prob=recipe.clean_prob, device=device)

    return make(trained, recipe.seed), make(held, recipe.seed + 1)


def image_sample(tokenizer: HitTokenizer, batches: PairBatches, images: int = 256) -> list[Tensor]:
    """The first training crops at each target size."""
    return tokenizer.pyramid(batches.hr(0, images))


@torch.no_grad()
def latent_sample(stage: AutoencoderStage, images: int, size: int = 32) -> list[Tensor]:
    """Latents of the first `images` training crops at each target size."""
    levels: list[list[Tensor]] = [[] for _ in stage.model.config.targets]
    for i in range(max(images // size, 1)):
        for level, image in zip(levels, stage.model.pyramid(stage.batches.hr(i, size)), strict=True):
            with stage.autocast():
                level.append(stage.model.encode(image).float())
    return [torch.cat(level) for level in levels]


def adopt(model: nn.Module, averaged: nn.Module) -> None:
    """Take over the averaged weights of a finished stage."""
    model.load_state_dict(averaged.state_dict())
