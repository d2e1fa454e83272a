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
from hitsr_fast.evaluate.layouts import images_in, is_image, shown
from hitsr_fast.evaluate.report import write_text
from hitsr_fast.evaluate.sets import PAIR_SCALE, read_image
from hitsr_fast.imaging.io import Picture
from hitsr_fast.imaging.writing import write_picture

_FORMAT: Final = 1

# The manifest is written each time that so many pairs are made: a run that is killed loses fewer.
_WRITE_EVERY: Final = 100


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
        out: folder of the set. What lies there already is kept where it has the manifest's digests, and made
            anew where it has not.
        count: pairs to make.
        crop: side of the HR images, a multiple of 4; that of the LR images is a quarter.
        seed: not negative.
        degradation: strengths, out of `PRESETS`.
        progress: called with the name of each pair before its work starts.

    Raises:
        EvaluationError: an argument out of range, no photo large enough, a broken one, `out` holds another
            set or other images, or one of the two folders lies in the other.
    """
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("crop", crop, PAIR_SCALE)):
        if value < least:
            raise EvaluationError(f"{name}: expected at least {least}, found {value}")
    if crop % PAIR_SCALE:
        raise EvaluationError(f"crop: expected a multiple of {PAIR_SCALE}, found {crop}")
    if degradation not in PRESETS:
        known = ", ".join(PRESETS)
        raise EvaluationError(f"degradation: expected one of {known}, found {degradation!r}")
    ours, theirs = out.resolve(), hr.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise EvaluationError(f"out: expected a folder apart from the photos' {hr}, found {out}")
    photos = images_in(hr)
    sizes = {path: tuple(read_image(path).shape[2:]) for path in photos}
    small = [path.name for path in photos if min(sizes[path]) < crop]
    photos = [path for path in photos if min(sizes[path]) >= crop]
    if not photos:
        raise EvaluationError(f"{hr}: no photo has sides of {crop} px")
    notes = [f"{hr}: smaller than {crop} px, left out: {shown(small)}"] if small else []
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
    recorded = _known_pairs(manifest, settings)
    places = [_place(seed, index, photos, sizes, crop) for index in range(count)]
    names = [f"{place[0].stem}_{index:05d}" for index, place in enumerate(places)]
    _check_images(out, names if manifest.exists() else [])
    if not manifest.exists():
        _write_manifest(manifest, settings, {})
    # Those that are not reached keep their entries, so that an interruption loses none.
    pairs = {index: recorded[name] for index, name in enumerate(names) if name in recorded}
    made, changed = 0, list[str]()
    try:
        for path in photos:
            photo: Tensor | None = None
            for index in [index for index, place in enumerate(places) if place[0] == path]:
                _, top, left = places[index]
                name = names[index]
                if progress is not None:
                    progress(name)
                files = [out / half / f"{name}.png" for half in ("HR", "LR")]
                entry = {"name": name, "photo": path.name, "top": top, "left": left}
                wanted = recorded.get(name)
                found = [_digest_of(file) for file in files]
                if wanted is not None and wanted == {**entry, "hr": found[0], "lr": found[1]}:
                    continue
                if wanted is not None and None not in found:
                    changed.append(name)
                photo = read_image(path) if photo is None else photo
                image = photo[..., top : top + crop, left : left + crop]
                config = PRESETS[degradation]
                lr = degrade(image, seed, config=config, scale=PAIR_SCALE, first_index=index)
                for file, part in zip(files, (image, lr), strict=True):
                    _write(file, part)
                digests = [_digest(read_image(file)) for file in files]
                pairs[index] = {**entry, "hr": digests[0], "lr": digests[1]}
                made += 1
                if made % _WRITE_EVERY == 0:
                    _write_manifest(manifest, settings, pairs)
    finally:
        if made:
            _write_manifest(manifest, settings, pairs)
    digest = _write_manifest(manifest, settings, pairs, whole=True)
    if changed:
        notes.append(f"{out}: other than in the manifest, made anew: {shown(changed)}")
    return MadePairs(made, count - made, tuple(notes), digest)


def _write_manifest(
    path: Path, settings: dict[str, Any], pairs: dict[int, dict[str, Any]], *, whole: bool = False
) -> str:
    """Write what there is of the pairs; only a whole set has a digest, which is returned."""
    listed = [pairs[index] for index in sorted(pairs)]
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    own = {"digest": digest} if whole else {}
    write_text(path, json.dumps({"settings": settings, **own, "pairs": listed}, indent=1) + "\n")
    return digest


def _check_images(out: Path, names: list[str]) -> None:
    """Raise EvaluationError where the set's folders hold images that are not its own."""
    for folder in (out / "HR", out / "LR"):
        if folder.is_dir():
            files = {path.name for path in folder.iterdir() if is_image(path)}
            if other := sorted(files - {f"{name}.png" for name in names}):
                raise EvaluationError(f"{folder}: expected images of this set only, found {shown(other)}")


def _place(
    seed: int, index: int, photos: list[Path], sizes: dict[Path, tuple[int, ...]], crop: int
) -> tuple[Path, int, int]:
    """The photo of a crop, and its top left corner there."""
    draw = np.random.default_rng([seed, index])
    path = photos[int(draw.integers(len(photos)))]
    top, left = (int(draw.integers(side - crop + 1)) for side in sizes[path])
    return path, top, left


def _known_pairs(manifest: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name, the pairs that a manifest has; EvaluationError where it is that of another set."""
    if not manifest.exists():
        return {}
    try:
        whole = json.loads(manifest.read_text(encoding="utf-8"))
        found = dict(whole["settings"])
        pairs = {str(pair["name"]): dict(pair) for pair in whole.get("pairs", [])}
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{manifest}: expected a manifest of pairs: {error}") from error
    other = [name for name, value in settings.items() if found.get(name) != value]
    if other:
        names = ", ".join(other)
        raise EvaluationError(f"{manifest}: holds another set, of other {names}: give another folder")
    return pairs


def _digest_of(path: Path) -> str | None:
    """Of an image file's pixels; None where there is no whole image."""
    try:
        return _digest(read_image(path))
    except EvaluationError:
        return None


def _digest(image: Tensor) -> str:
    """Of an image's pixels, whatever the file's compression."""
    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def _write(path: Path, image: Tensor) -> None:
    pixels = (image[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    write_picture(path, Picture(np.ascontiguousarray(pixels)), "png", overwrite=True)
