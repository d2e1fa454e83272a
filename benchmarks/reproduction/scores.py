"""PSNR-Y and LPIPS of what the phases yield, at each output size."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from hitsr_fast.metrics import psnr_y
from hitsr_fast.metrics.lpips import lpips
from hitsr_fast.models import HitConfig, HitTokenizer, HitVar
from hitsr_fast.models.hit_var.sampler import HitSampler
from hitsr_fast.train.config import DataConfig, Recipe
from hitsr_fast.train.data import open_source
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.model import model_config
from hitsr_fast.train.pairs import lr_pairs

RESULTS = Path(__file__).parents[1] / "results" / "reproduction.csv"
CHUNK = 16


class Row(NamedTuple):
    """A score of one model on the held-out crops.

    Attributes:
        table: "1a", reconstruction from an image's own tokens; "2", super-resolution, which has Table 1b; or
            "tokens", what the tokens that the transformers of Table 2 learn give where all are right.
        method: The tokenizer and tokenization, or the transformer's phase.
        side: Of the output in pixels.
        seed: Of the run.
        psnr_y: In dB, mean over the crops.
        lpips: LPIPS-AlexNet, likewise.
    """

    table: str
    method: str
    side: int
    seed: int
    psnr_y: float
    lpips: float


def score_run(
    recipes: Iterable[tuple[Recipe, Path]], tokenizer: str, photos: Path, seed: int, crops: int
) -> Iterator[Row]:
    """All rows of a seed, whose first run has the tokenizer; the crops are the same for every seed."""
    (hit, run), *others = recipes
    config = model_config(hit)
    images, lr, class_id = held_out_pairs(config, photos, crops)
    for method, outputs in reconstructions(config, run, tokenizer, images).items():
        yield from _rows("1a", method, seed, config, outputs, images)
    for method, levels in of_right_tokens(config, run, tokenizer, images).items():
        yield from _rows("tokens", method, seed, config, levels, images)
    for recipe, folder in ((hit, run), *others):
        for phase in recipe.phases:
            if phase.task.kind == "next_scale":
                state = artifact(run, tokenizer) | artifact(folder, phase.name)
                outputs = super_resolved(model_config(recipe), state, lr, class_id)
                yield from _rows("2", phase.name, seed, config, outputs, images)


def held_out_pairs(config: HitConfig, photos: Path, crops: int) -> tuple[Tensor, Tensor, Tensor]:
    """HR `(N, 3, S, S)` and degraded LR `(N, 3, S / 4, S / 4)` in [-1, 1], and classes `(N,)`, all 0."""
    side = config.tokenizer.image_size
    source = open_source(photos, holdout=None, crop=side, held_out=True)
    stack = torch.stack([source.crop(0, "reproduction", i, side) for i in range(crops)])
    hr = stack.float().div(127.5).sub(1)
    draw = Draw(0, "reproduction", torch.arange(crops), "cpu")
    lr, class_id = lr_pairs(hr, draw, DataConfig(clean_prob=0.0))
    return hr, lr, class_id


@torch.no_grad()
def reconstructions(
    config: HitConfig, run: Path, tokenizer: str, images: Tensor
) -> dict[str, list[Tensor | None]]:
    """What comes back of the images' own tokens, at each target: Table 1a's three rows.

    "plain": the tokens of the full image alone, one decoder, which gives the last target only. "plain*": the
    same weights, tokens by Algorithm 1. "hierarchical": after fine-tuning on those, a decoder a target.
    """
    plain, fine = (tokenizer_of(config, run, phase) for phase in ("plain", tokenizer))
    found: dict[str, list[list[Tensor]]] = {"plain": [], "plain*": [], "hierarchical": []}
    last = len(config.tokenizer.targets) - 1
    for chunk in images.split(CHUNK):
        full = plain.quantize.quantize(plain.encode(chunk)).reconstruction
        found["plain"].append([plain.decode(full, last)])
        for name, model, own in (("plain*", plain, False), ("hierarchical", fine, True)):
            latents = model.tokenize(chunk).reconstructions
            found[name].append([model.decode(z, i if own else last) for i, z in enumerate(latents)])
    outputs: dict[str, list[Tensor | None]] = {}
    for name, chunks in found.items():
        levels: list[Tensor | None] = [torch.cat(level) for level in zip(*chunks, strict=True)]
        outputs[name] = [None] * (last + 1 - len(levels)) + levels
    return outputs


@torch.no_grad()
def of_right_tokens(config: HitConfig, run: Path, tokenizer: str, images: Tensor) -> dict[str, list[Tensor]]:
    """The images' own plain and hierarchical tokens, decoded as those that a transformer predicts."""
    model = tokenizer_of(config, run, tokenizer)
    found: dict[str, list[list[Tensor]]] = {"plain": [], "hierarchical": []}
    for chunk in images.split(CHUNK):
        found["plain"].append(model.decode_indices(model.quantize.quantize(model.encode(chunk)).indices))
        found["hierarchical"].append(model.decode_indices(model.tokenize(chunk).indices))
    return {name: [torch.cat(level) for level in zip(*chunks, strict=True)] for name, chunks in found.items()}


@torch.no_grad()
def super_resolved(
    config: HitConfig, state: Mapping[str, Tensor], lr: Tensor, class_id: Tensor
) -> list[Tensor | None]:
    """Greedy outputs of a transformer at each target.

    With plain tokens x1 and x2 are the first scales' codes laid on the grid of that target, by the decoder of
    that target.
    """
    model = HitVar(config)
    model.load_state_dict(dict(state))
    model.eval()
    sampler = HitSampler(model)
    chunks = []
    for tiles, classes in zip(lr.split(CHUNK), class_id.split(CHUNK), strict=True):
        _, latents = sampler.sample(model.lr_features(tiles), classes)
        chunks.append([model.decode(latents, target, tiles) for target in range(len(latents))])
    return [torch.cat(level) for level in zip(*chunks, strict=True)]


def tokenizer_of(config: HitConfig, run: Path, phase: str) -> HitTokenizer:
    """The tokenizer that a phase yields."""
    model = HitTokenizer(config.tokenizer)
    own = {key: value for key, value in artifact(run, phase).items() if key.startswith("tokenizer.")}
    model.load_state_dict({key.removeprefix("tokenizer."): value for key, value in own.items()})
    return model.eval()


def artifact(run: Path, phase: str) -> dict[str, Tensor]:
    """The tensors that a phase yields."""
    return load_file(run / phase / "artifact" / "model.safetensors")


def _rows(
    table: str, method: str, seed: int, config: HitConfig, outputs: Sequence[Tensor | None], images: Tensor
) -> Iterator[Row]:
    levels = HitTokenizer(config.tokenizer).pyramid(images)
    for output, level in zip(outputs, levels, strict=True):
        if output is not None:
            output = output.float().clamp(-1, 1)
            scores = psnr_y((output + 1) / 2, (level + 1) / 2).mean(), lpips(output, level).mean()
            yield Row(table, method, level.shape[-1], seed, *(round(float(score), 4) for score in scores))


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One line a row."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` wrote."""
    with path.open(newline="") as file:
        return [
            Row(
                r["table"], r["method"], int(r["side"]), int(r["seed"]), float(r["psnr_y"]), float(r["lpips"])
            )
            for r in csv.DictReader(file)
        ]
