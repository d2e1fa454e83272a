"""`HitSR`: an image of any size and kind in, the same restored and enlarged out.

The model sees square tiles only. A band of tiles is run, blended with the bands above and handed on, so the
memory in use besides the images themselves does not grow with their height.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from hitsr_fast.checks import check_integer
from hitsr_fast.imaging.colour import RowColourFix
from hitsr_fast.imaging.io import Picture, picture_from_pil, picture_to_pil
from hitsr_fast.imaging.tiles import RowBlender, TilePlan
from hitsr_fast.models.base import INPUTS, Model, SuperResolver
from hitsr_fast.pipeline.devices import pick_device, pick_dtype
from hitsr_fast.pipeline.options import UpscaleOptions
from hitsr_fast.pipeline.pictures import blank, colour_rows, enlarged_rows, output_picture
from hitsr_fast.pipeline.tiles import Progress, ReadRows, TileRunner

ImageT = TypeVar("ImageT", Image.Image, Tensor)


class Upscaled(dict[int, ImageT]):
    """The outputs of one image, `{factor: image}`; `.x4` is that of factor 4, None where not asked for."""

    def __getattr__(self, name: str) -> Any:
        if not re.fullmatch(r"x\d+", name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.get(int(name[1:]))


class Rows(NamedTuple):
    """Finished rows of an output from row `top`: `image` (B, 3, n, W * factor) float32 in [0, 1]."""

    factor: int
    top: int
    image: Tensor


class PictureRows(NamedTuple):
    """Finished rows of an output picture from row `top`."""

    factor: int
    top: int
    picture: Picture


class HitSR:
    """A super-resolution model and the way of images to it and back.

    Args:
        model: see `SuperResolver`; already on `device`.
        device: where tiles are run and blended.

    Raises:
        TypeError: `model` is not laid out for inference.
    """

    def __init__(self, model: SuperResolver, device: torch.device | str = "cpu") -> None:
        if isinstance(model, Model):
            found = type(model).__name__
            raise TypeError(f"model: expected what `for_inference` gives, found a {found}: call it first")
        self.model = model
        self.device = torch.device(device)
        self._tiles = TileRunner(model, self.device)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        device: torch.device | str = "auto",
        dtype: torch.dtype | None = None,
    ) -> HitSR:
        """Load a model from `config.json` and `model.safetensors`.

        Args:
            name_or_folder: see `find_weights`.
            device: `auto` is CUDA where there is one, else the CPU.
            dtype: to compute in; by default see `pick_dtype`.

        Raises:
            ModelNotFoundError: no such model, or one of its two files is missing.
            ValueError: the device is not there, or the files do not fit together.
        """
        device = pick_device(device)
        # In float32, whatever the file's dtype: what is added up beforehand is added up exactly.
        model = Model.from_pretrained(name_or_folder, device=device, dtype=torch.float32)
        return cls(model.for_inference(pick_dtype(device) if dtype is None else dtype), device)

    def plan(self, height: int, width: int, options: UpscaleOptions) -> TilePlan:
        """The tiles of a `height x width` image.

        Raises:
            ValueError: if `options` asks for what the model does not have.
        """
        options.factors(self.model)
        side = self.model.lr_tile
        overlap = side // 4 if options.overlap is None else options.overlap
        return TilePlan.cover(height, width, side, overlap)

    def upscale(
        self,
        image: ImageT,
        *,
        progress: Progress | None = None,
        class_id: int | None = None,
        **options: Any,
    ) -> Upscaled[ImageT]:
        """Restore an image at its own size (x1) and enlarge it by the model's other factors, in one pass.

        Args:
            image: a PIL image of any mode, or a `(B, 3, H, W)` floating tensor in [0, 1], H and W at least 1.
            progress: called with the tiles done and the tiles in all.
            class_id: deprecated: 0 is `input="photo"`, 1 is `input="clean"`.
            options: see `UpscaleOptions.of`.

        Returns:
            PIL images for a PIL image: upright, grey for grey, with its alpha, ICC profile and other EXIF.
            `(B, 3, H * factor, W * factor)` float32 tensors in [0, 1] on its device for a tensor.

        Raises:
            TypeError: if `image` is neither, or a tensor that is not floating.
            ValueError: if a shape, a value or an option is out of range.
            NonFiniteOutputError: if the model gives NaN for a tile, in float32 too.

        Notes:
            Equal arguments give equal outputs on one machine. With `top_k != 1` the draws depend on `batch`;
            in half precision so do roundings, and on the number of threads, and with them a few tokens.
        """
        if class_id is not None:
            warnings.warn("class_id is deprecated: use input='photo' or 'clean'", DeprecationWarning, 2)
            check_integer("class_id", class_id, 0, 1)
            if "input" in options:
                found = f"class_id={class_id} and input={options['input']!r}"
                raise ValueError(f"class_id: expected only one of class_id and input, found {found}")
            options["input"] = INPUTS[class_id]
        how = UpscaleOptions.of(**options)
        if isinstance(image, Image.Image):
            pictures = self.upscale_picture(picture_from_pil(image), how, progress)
            return Upscaled({factor: picture_to_pil(picture) for factor, picture in pictures.items()})
        return Upscaled(self.upscale_tensor(image, how, progress))

    def upscale_tensor(
        self, image: Tensor, options: UpscaleOptions, progress: Progress | None = None
    ) -> dict[int, Tensor]:
        """As `upscale`, of a tensor, with options that are made already."""
        if not isinstance(image, Tensor) or not image.is_floating_point():
            found = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"image: expected a PIL image or a floating tensor, found {found}")
        if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape:
            shape = tuple(image.shape)
            raise ValueError(f"image: expected shape (B, 3, H, W), none of them 0, found {shape}")
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise ValueError(f"image: expected values in [0, 1], found {image.min():g}..{image.max():g}")
        b, _, height, width = image.shape
        outputs = {
            factor: torch.empty(b, 3, height * factor, width * factor, device=image.device)
            for factor in options.factors(self.model)
        }

        def read_rows(begin: int, end: int) -> Tensor:
            return image[:, :, begin:end].detach()

        for factor, top, rows in self.stream(read_rows, height, width, options, progress):
            outputs[factor][:, :, top : top + rows.shape[2]] = rows
        return outputs

    def upscale_picture(
        self, picture: Picture, options: UpscaleOptions, progress: Progress | None = None
    ) -> dict[int, Picture]:
        """Upscale a decoded image file into pictures held whole; see `stream_picture`.

        Returns:
            A picture for each wanted factor. For the errors see `upscale`.
        """
        outputs = {factor: blank(picture, factor) for factor in options.factors(self.model)}
        for factor, top, rows in self.stream_picture(picture, options, progress):
            output = outputs[factor].rows(top, top + rows.height)
            output.pixels[:] = rows.pixels
            if output.alpha is not None:
                output.alpha[:] = rows.alpha
        return outputs

    def stream_picture(
        self, picture: Picture, options: UpscaleOptions, progress: Progress | None = None
    ) -> Iterator[PictureRows]:
        """Upscale a decoded image file: 16 bits stay 16, grey stays grey, alpha goes its own way.

        Yields:
            Rows of each wanted factor, from its top downwards, each row once. For the errors see `upscale`.
        """
        read_rows = functools.partial(colour_rows, picture)
        for factor, top, image in self.stream(read_rows, picture.height, picture.width, options, progress):
            yield PictureRows(factor, top, output_picture(picture, factor, top, image))

    def stream(
        self,
        read_rows: ReadRows,
        height: int,
        width: int,
        options: UpscaleOptions,
        progress: Progress | None = None,
    ) -> Iterator[Rows]:
        """Upscale an image that is read by rows, into rows: the way for images that do not fit into memory.

        Args:
            read_rows: `(begin, end)` -> those rows as (B, 3, end - begin, W) floating in [0, 1]; about
                a tile's side at a time, each row a few times.
            height: H of the image.
            width: W of the image.
            options: see `UpscaleOptions`.
            progress: see `upscale`.

        Yields:
            Rows of each factor, from its top downwards, each row once.
        """
        plan, factors = self.plan(height, width, options), options.factors(self.model)
        blenders = {factor: RowBlender(plan, factor) for factor in factors}
        fixes = {factor: RowColourFix(self.model.colour_fix_levels[factor]) for factor in factors}
        tops = dict.fromkeys(factors, 0)
        for band, outputs in enumerate(self._tiles.run(read_rows, plan, options, progress)):
            top, last = plan.tops[band], band + 1 == len(plan.tops)
            end = height if last else plan.tops[band + 1]
            for factor in factors:
                rows = blenders[factor].add_band(outputs.pop(factor))
                if options.colour_fix:
                    source = enlarged_rows(read_rows, top * factor, end * factor, height, factor)
                    rows = fixes[factor].add_rows(rows, source.to(rows), last)
                if rows.shape[2]:
                    yield Rows(factor, tops[factor], rows.clamp(0, 1))
                    tops[factor] += rows.shape[2]
