"""Methods to compare: what makes larger images from an LR image, or has made them before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import PIL
from PIL import Image
from torch import Tensor

from hitsr_fast.evaluate.errors import EvaluationError
from hitsr_fast.evaluate.layouts import by_stem, image_name, images_in
from hitsr_fast.evaluate.sets import PAIR_SCALE, to_tensor
from hitsr_fast.pipeline import HitSR, UpscaleOptions


class Method(Protocol):
    """Anything that makes larger images from an LR image: implement this to compare another peer.

    A method that also has a string `fingerprint`, which changes when its results would, can go on with an
    evaluation that was interrupted; one that has `scales` is asked for these only.
    """

    @property
    def name(self) -> str:
        """What the table calls it."""
        ...

    def upscale(self, lr: Tensor, scales: Sequence[int]) -> dict[int, Tensor]:
        """Restore an LR image at several scales.

        Args:
            lr: float32 `(1, 3, h, w)`, RGB in [0, 1], on the evaluation's device.
            scales: the factors wanted, out of `SCALES`.

        Returns:
            For each scale `s` a floating-point `(1, 3, s h, s w)`, RGB in [0, 1].
        """
        ...


@runtime_checkable
class Finder(Protocol):
    """A method whose results exist already: they are found by set, scale and image."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        ...

    def find(self, eval_set: str, image: str, scale: int) -> Path | None:
        """The file of a result, as large as `Method.upscale` would give it for the whole input; None if
        none."""
        ...


class Bicubic:
    """Pillow's bicubic interpolation: the baseline of every table. Scale 1 is the LR image itself."""

    name = "bicubic"
    fingerprint = f"Pillow {PIL.__version__}"

    def upscale(self, lr: Tensor, scales: Sequence[int]) -> dict[int, Tensor]:
        """As `Method.upscale`."""
        image = Image.fromarray((lr[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy())
        size = {scale: (image.width * scale, image.height * scale) for scale in scales}
        resized = {scale: image.resize(size[scale], Image.Resampling.BICUBIC) for scale in scales}
        return {scale: to_tensor(result).to(lr.device) for scale, result in resized.items()}


class HitSRMethod:
    """A model as a method.

    Args:
        name: what the table calls it.
        model: the model.
        options: how to upscale; its `scales` are those of the evaluation.
        fingerprint: of the model's weights; see `Method`.

    Attributes:
        scales: the factors that the model offers.
        fingerprint: of weights and options; None without one of the weights.
    """

    def __init__(
        self, name: str, model: HitSR, options: UpscaleOptions | None = None, fingerprint: str | None = None
    ) -> None:
        self.name, self._model, self._options = name, model, options or UpscaleOptions()
        self.scales = tuple(model.model.scale_factors)
        self.fingerprint = fingerprint and f"{fingerprint} {replace(self._options, scales=None)}"

    def upscale(self, lr: Tensor, scales: Sequence[int]) -> dict[int, Tensor]:
        """As `Method.upscale`."""
        return self._model.upscale_tensor(lr, replace(self._options, scales=tuple(scales)))


class Pictures:
    """Results that another program has written, as a method.

    Args:
        name: what the table calls it.
        folder: of the files: FOLDER/SET/xSCALE, FOLDER/xSCALE, or, for the results of x4, FOLDER/SET or
            FOLDER. A file belongs to the image of its name, or else of its name without the marks of a pair.

    Raises:
        EvaluationError: there is no such folder; and when an image is sought that has two files.
    """

    def __init__(self, name: str, folder: Path) -> None:
        if not folder.is_dir():
            raise EvaluationError(f"{name}: {folder}: no such folder")
        self.name, self._folder = name, folder
        # Of each set and scale the files by their names, and those without marks.
        self._found: dict[tuple[str, int], tuple[dict[str, Path], dict[str, list[Path]]]] = {}

    def find(self, eval_set: str, image: str, scale: int) -> Path | None:
        """As `Finder.find`."""
        key = eval_set, scale
        if key not in self._found:
            self._found[key] = self._scan(eval_set, scale)
        stems, unmarked = self._found[key]
        if image in stems:
            return stems[image]
        found = unmarked.get(image, [])
        if len(found) > 1:
            first, second = found[0].name, found[1]
            raise EvaluationError(f"{second}: {self.name}'s result has the same name as {first}")
        return found[0] if found else None

    def _scan(self, eval_set: str, scale: int) -> tuple[dict[str, Path], dict[str, list[Path]]]:
        places = [self._folder / eval_set / f"x{scale}", self._folder / f"x{scale}"]
        if scale == PAIR_SCALE:
            places += [self._folder / eval_set, self._folder]
        place = next((place for place in places if place.is_dir()), None)
        unmarked: dict[str, list[Path]] = {}
        if place is None or all(path.is_dir() or path.name.startswith(".") for path in place.iterdir()):
            return {}, unmarked
        files = images_in(place)
        for path in files:
            unmarked.setdefault(image_name(path), []).append(path)
        return by_stem(files), unmarked


def file_fingerprint(path: Path) -> str:
    """Of a file's content."""
    try:
        with path.open("rb") as file:
            digest = hashlib.blake2b(digest_size=16)
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror or error}") from error
    return digest.hexdigest()
