"""A set of pairs made of photos: crops at random places, degraded, as the papers' DIV2K validation set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hitsr_fast.data.degradation import degrade
from hitsr_fast.data.degradation_config import PRESETS, DegradationName
from hitsr_fast.evaluate.errors import EvaluationError
from hitsr_fast.evaluate.layouts import images_in, shown
from hitsr_fast.evaluate.report import write_text
from hitsr_fast.evaluate.sets import PAIR_SCALE, read_image
from hitsr_fast.imaging.io import Picture
from hitsr_fast.imaging.writing import write_picture

_FORMAT: Final = 1


class MadePairs(NamedTuple):
    """What `make_pairs` has done."""

    made: int
    found: int
    notes: tuple[str, ...]
    digest: str


def make_pairs(
    hr: Path,
    out: Path,
    *,
    count: int = 3000,
    crop: int = 512,
    seed: int = 0,
    degradation: DegradationName = "x4plus",
    progress: Callable[[str], None] | None = None,
) -> MadePairs:
    """Write OUT/HR, OUT/LR and OUT/manifest.json.

    Crop number `i` is cut out of a photo and at a place that (`seed`, `i`) draw, and degraded by the stream
    of (`seed`, `i`): it depends on no other crop, so that a run that was interrupted goes on where it was.

    Args:
        hr: folder of photos; those smaller than the crop are left out, and a note names them.
        out: folder of the set.
        count: pairs to make.
        crop: side of the HR images, a multiple of 4; that of the LR images is a quarter.
        seed: not negative.
        degradation: strengths, out of `PRESETS`.
        progress: called with the name of each pair before its work starts.

    Raises:
        EvaluationError: an argument out of range, no photo large enough, a broken one, or `out` holds
            another set.
    """
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("crop", crop, PAIR_SCALE)):
        if value < least:
            raise EvaluationError(f"{name}: expected at least {least}, found {value}")
    if crop % PAIR_SCALE:
        raise EvaluationError(f"crop: expected a multiple of {PAIR_SCALE}, found {crop}")
    if degradation not in PRESETS:
        known = ", ".join(PRESETS)
        raise EvaluationError(f"degradation: expected one of {known}, found {degradation!r}")
    photos = images_in(hr)
    sizes = {path: tuple(read_image(path).shape[2:]) for path in photos}
    small = [path.name for path in photos if min(sizes[path]) < crop]
    photos = [path for path in photos if min(sizes[path]) >= crop]
    if not photos:
        raise EvaluationError(f"{hr}: no photo has sides of {crop} px")
    notes = (f"{hr}: smaller than {crop} px, left out: {shown(small)}",) if small else ()
    settings: dict[str, Any] = {
        "format": _FORMAT,
        "count": count,
        "crop": crop,
        "scale": PAIR_SCALE,
        "seed": seed,
        "degradation": degradation,
        "strengths": asdict(PRESETS[degradation]),
        "photos": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in photos},
    }
    settings = json.loads(json.dumps(settings))
    manifest = out / "manifest.json"
    _check_same(manifest, settings)
    write_text(manifest, json.dumps({"settings": settings}, indent=1) + "\n")
    places = [_place(seed, index, photos, sizes, crop) for index in range(count)]
    pairs: dict[int, dict[str, Any]] = {}
    made = 0
    for path in photos:
        photo: Tensor | None = None
        for index in [index for index, place in enumerate(places) if place[0] == path]:
            _, top, left = places[index]
            name = f"{path.stem}_{index:05d}"
            if progress is not None:
                progress(name)
            files = [out / half / f"{name}.png" for half in ("HR", "LR")]
            if not all(file.is_file() for file in files):
                photo = read_image(path) if photo is None else photo
                image = photo[..., top : top + crop, left : left + crop]
                config = PRESETS[degradation]
                lr = degrade(image, seed, config=config, scale=PAIR_SCALE, first_index=index)
                for file, part in zip(files, (image, lr), strict=True):
                    _write(file, part)
                made += 1
            digests = [_digest(read_image(file)) for file in files]
            pairs[index] = {"name": name, "photo": path.name, "top": top, "left": left}
            pairs[index] |= {"hr": digests[0], "lr": digests[1]}
    listed = [pairs[index] for index in range(count)]
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    whole = {"settings": settings, "digest": digest, "pairs": listed}
    write_text(manifest, json.dumps(whole, indent=1) + "\n")
    return MadePairs(made, count - made, notes, digest)


def _place(
    seed: int, index: int, photos: list[Path], sizes: dict[Path, tuple[int, ...]], crop: int
) -> tuple[Path, int, int]:
    """The photo of a crop, and its top left corner there."""
    draw = np.random.default_rng([seed, index])
    path = photos[int(draw.integers(len(photos)))]
    top, left = (int(draw.integers(side - crop + 1)) for side in sizes[path])
    return path, top, left


def _check_same(manifest: Path, settings: dict[str, Any]) -> None:
    """Raise EvaluationError where the manifest is that of another set."""
    if not manifest.exists():
        return
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{manifest}: expected a manifest of pairs: {error}") from error
    other = [name for name, value in settings.items() if found.get(name) != value]
    if other:
        names = ", ".join(other)
        raise EvaluationError(f"{manifest}: holds another set, of other {names}: give another folder")


def _digest(image: Tensor) -> str:
    """Of an image's pixels, whatever the file's compression."""
    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def _write(path: Path, image: Tensor) -> None:
    pixels = (image[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    write_picture(path, Picture(np.ascontiguousarray(pixels)), "png", overwrite=True)
