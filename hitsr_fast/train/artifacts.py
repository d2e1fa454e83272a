"""What a phase leaves behind, and what it was made with: digests, fingerprints, and differences in words."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hitsr_fast._version import __version__
from hitsr_fast.train.config import Phase, Recipe

DESCRIPTION, WEIGHTS = "artifact.json", "model.safetensors"


def sources(recipe: Recipe, phase: Phase) -> list[str]:
    """What a phase starts from; a phase without steps stands for what it would start from itself."""
    by_name = {other.name: other for other in recipe.phases}
    found: list[str] = []
    for source in phase.init_from:
        kind, _, name = source.partition(":")
        left_out = kind == "phase" and not by_name[name].schedule.steps
        found += sources(recipe, by_name[name]) if left_out else [source]
    return found


def file_of(source: str) -> Path:
    """The file that "file:PATH" or "public:PATH" names; a folder stands for its `model.safetensors`.

    Raises:
        ValueError: There is none.
    """
    path = Path(source.partition(":")[2]).expanduser()
    places = [path, path / WEIGHTS, path / "artifact" / WEIGHTS]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"init_from: expected a file, or a folder with {WEIGHTS}, found none at {str(path)!r}")


class StaleError(ValueError):
    """What a run folder holds was made with other values than the recipe's; the message names them."""


def made_with(
    recipe: Recipe, phase: Phase, model: Mapping[str, Any], photos: str, init_from: list[tuple[str, str]]
) -> dict[str, Any]:
    """All values that the outcome of a phase depends on, as nested JSON.

    Args:
        recipe: Of the run.
        phase: One of its phases.
        model: The model's configuration, as nested JSON.
        photos: Digest of the photos.
        init_from: What the phase starts from, with the digest of each.
    """
    values = asdict(phase)
    for name in ("parallel", "init_from"):
        del values[name]
    data = asdict(recipe.data)
    for name in ("workers", "prefetch", "memory_mib"):
        del data[name]
    if not data["sources"]:
        del data["sources"]  # as recipes were before there were any
    made = {
        "seed": recipe.seed,
        "photos": photos,
        "data": data,
        "model": model,
        "phase": values,
        "init_from": [list(pair) for pair in init_from],
    }
    nested: dict[str, Any] = json.loads(json.dumps(made))  # tuples are lists, as in a file
    return nested


def fingerprint(made: Mapping[str, Any]) -> str:
    """A hash of what a phase was made with."""
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


def differences(made: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """What differs between what the phase in `folder` was made with and what it would be made with now."""
    phase, found = now["phase"]["name"], []
    if made["photos"] != now["photos"]:
        found.append(f"photos: {folder} was made from others ({_short(made['photos'], now['photos'])})")
    before, after = (dict(_leaves({part: values[part] for part in _VALUES})) for values in (made, now))
    for key in dict.fromkeys([*after, *before]):
        if before.get(key) != after.get(key):
            name = f"{phase}.{key.removeprefix('phase.')}" if key.startswith("phase.") else key
            was, has = (json.dumps(values[key]) if key in values else "nothing" for values in (before, after))
            found.append(f"{name}: {folder} was made with {was}, the recipe has {has}")
    was, has = made["init_from"], now["init_from"]
    if [_identity(name) for name, _ in was] != [_identity(name) for name, _ in has]:
        names = (", ".join(name for name, _ in pairs) or "nothing" for pairs in (was, has))
        found.append("{}.init_from: {} was made from {}, the recipe has {}".format(phase, folder, *names))
    else:
        for (name, old), (_, new) in zip(was, has, strict=True):
            if new not in (old, UNKNOWN):
                found.append(f"{phase}.init_from: {folder} was made from another {name} ({_short(old, new)})")
    return found


_VALUES = ("seed", "data", "model", "phase")


def _identity(source: str) -> str:
    """What must be the same of a source beside its digest: where a file lies need not."""
    return source if source.startswith("phase:") else source.partition(":")[0]


def _short(old: str, new: str) -> str:
    return f"digest {old[:12]}, now {new[:12]}"


UNKNOWN = "unknown"
"""Digest of what is not made yet: equal to any."""


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def digest_of(file: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def write_artifact(folder: Path, tensors: Mapping[str, Tensor], made: Mapping[str, Any]) -> None:
    """Write what a phase yields: beside, flushed to the disk and renamed, so whole or not there."""
    beside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        write_file(beside / WEIGHTS, save(_apart(tensors)))
        description = {
            "phase": made["phase"]["name"],
            "digest": digest_of(beside / WEIGHTS),
            "fingerprint": fingerprint(made),
            "made_with": made,
            "hitsr_fast": __version__,
        }
        write_file(beside / DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())
        replace_folder(folder, beside)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, those that share memory copied: safetensors takes no others."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        place = own.untyped_storage().data_ptr()
        found[name] = own.clone() if place in seen else own
        seen.add(place)
    return found


def described(folder: Path, name: str = DESCRIPTION) -> dict[str, Any] | None:
    """What `artifact.json`, or another file, says; None where there is none.

    Raises:
        StaleError: It cannot be read.
    """
    file = folder / name
    if not file.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if "made_with" not in values:
            raise ValueError("it has no made_with")
    except ValueError as error:
        raise StaleError(f"{file}: cannot be read: {error}") from error
    return values


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; raises ValueError with its name where it cannot be read."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: is broken: {error}") from error


def write_file(path: Path, content: bytes) -> None:
    """Write a file beside, flush it to the disk and rename it; a fault leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def replace_folder(folder: Path, beside: Path) -> None:
    """Put a whole folder in another's place; at any moment one of the two is there under some name."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Make renames in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunFolder:
    """What a run's folder holds, against what a recipe would make of it.

    `<phase>/phase.json` says what a phase was begun with, `<phase>/artifact` is what it left.

    Args:
        folder: Of the run.
        recipe: Of the run.
        model: The model's configuration, as nested JSON.
        photos: Digest of the photos.
    """

    def __init__(self, folder: Path, recipe: Recipe, model: Mapping[str, Any], photos: str) -> None:
        self.folder, self.recipe, self.model, self.photos = folder, recipe, model, photos
        self._digests: dict[str, str] = {}  # of files that are no phase's, by source

    def artifact(self, phase: str) -> Path:
        """Where a phase leaves what it yields."""
        return self.folder / phase / "artifact"

    def made_with(self, phase: Phase) -> dict[str, Any]:
        """What a phase would be made with now."""
        named = [(source, self._digest(source)) for source in sources(self.recipe, phase)]
        return made_with(self.recipe, phase, self.model, self.photos, named)

    def check(self, rerun_stale: bool) -> None:
        """Raise StaleError where work was made with other values; or put it aside, and what follows it."""
        last = len(self.recipe.phases)
        for place, phase in enumerate(self.recipe.phases):
            faults = self._faults(phase)
            if faults:
                self._refuse(faults, rerun_stale)
                last = place
                break
        known = [phase.name for phase in self.recipe.phases]
        others = [name for name in self._worked_on() if name not in known]
        if others and last == len(known):
            fault = f"phases: {self.folder / others[0]} was made, the recipe has none of that name"
            self._refuse([fault], rerun_stale)
        for name in [*known[last:], *others]:
            if (self.folder / name).exists():
                (self.folder / name).rename(self._aside(name))

    def begin(self, phase: Phase) -> bool:
        """Whether a phase is still to be trained; it is then marked as begun.

        Raises:
            StaleError: It has work that was made from another outcome of a phase before it.
        """
        faults = self._faults(phase)
        if faults:
            self._refuse(faults, rerun_stale=False)
        if described(self.artifact(phase.name)) is not None:
            self._discard(phase.name)
            return False
        folder = self.folder / phase.name
        folder.mkdir(parents=True, exist_ok=True)
        made = self.made_with(phase)
        content = json.dumps({"fingerprint": fingerprint(made), "made_with": made}, indent=2) + "\n"
        write_file(folder / "phase.json", content.encode())
        return True

    def finish(self, phase: Phase, tensors: Mapping[str, Tensor]) -> None:
        """Write what a phase yields, and drop what it replaces."""
        write_artifact(self.artifact(phase.name), tensors, self.made_with(phase))
        self._discard(phase.name)

    def close(self) -> None:
        """Drop what was put aside of phases that the recipe does not have."""
        for aside in self.folder.glob("*.stale-*"):
            self._discard(aside.name.rpartition(".stale-")[0])

    def _faults(self, phase: Phase) -> list[str]:
        """Why the work of a phase, if there is any, is stale."""
        folder = self.folder / phase.name
        if phase.name not in self._worked_on():
            return []
        try:
            artifact = described(self.artifact(phase.name))
            begun = artifact or described(folder, "phase.json")
        except StaleError as error:
            return [str(error)]
        if begun is None:
            return [f"{folder}: has checkpoints, but no phase.json that says what they were made with"]
        faults = differences(begun["made_with"], self.made_with(phase), folder)
        if artifact is not None and not faults:
            weights = self.artifact(phase.name) / WEIGHTS
            found = digest_of(weights) if weights.is_file() else "missing"
            if found != artifact["digest"]:
                faults.append(f"{weights}: was changed after the phase ({_short(artifact['digest'], found)})")
        return faults

    def _refuse(self, faults: list[str], rerun_stale: bool) -> None:
        if not rerun_stale:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            advice = "--rerun-stale trains it, and what follows it, again"
            raise StaleError(f"{faults[0]}{more}; {advice}")

    def _digest(self, source: str) -> str:
        kind, _, name = source.partition(":")
        if kind == "phase":
            artifact = described(self.artifact(name))
            return UNKNOWN if artifact is None else str(artifact["digest"])
        if source not in self._digests:
            self._digests[source] = digest_of(file_of(source))
        return self._digests[source]

    def _worked_on(self) -> list[str]:
        """Phases whose folders hold work that could be lost."""
        found = [
            *self.folder.glob(f"*/artifact/{DESCRIPTION}"),
            *self.folder.glob("*/checkpoints/step-????????"),
        ]
        names = {path.relative_to(self.folder).parts[0] for path in found}
        return sorted(name for name in names if ".stale-" not in name)

    def _aside(self, name: str) -> Path:
        number = 1
        while (aside := self.folder / f"{name}.stale-{number}").exists():
            number += 1
        return aside

    def _discard(self, name: str) -> None:
        for aside in self.folder.glob(f"{name}.stale-*"):
            shutil.rmtree(aside)
