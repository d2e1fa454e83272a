"""`HitSR`: an image of any size and kind in, the same at x1, x2 and x4 out.

The model sees square tiles only. A band of tiles is run, blended with the bands above and handed on, so the
memory in use besides the images themselves does not grow with their height.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hitsr_fast.imaging.colour import RowColourFix
from hitsr_fast.imaging.io import Picture, picture_from_pil, picture_to_pil
from hitsr_fast.imaging.tiles import RowBlender, TilePlan

WEIGHTS = Path(__file__).parent / "weights"

# Levels of the colour fix where a model does not say. What counts as low frequency is measured in input
# pixels: one level less for each halving of the factor.
COLOUR_FIX_LEVELS = {1: 3, 2: 4, 4: 5}

# A bicubic output pixel depends on input rows at most two away; the third is margin.
_BICUBIC_REACH = 3

ImageT = TypeVar("ImageT", Image.Image, Tensor)
ReadRows = Callable[[int, int], Tensor]
Progress = Callable[[int, int], None]


class ModelNotFoundError(ValueError):
    """A model name that leads to no weights; the message says where was looked."""


class NonFiniteOutputError(RuntimeError):
    """The model gave NaN or infinity for a tile, in float32 too."""


class SuperResolver(Protocol):
    """What `HitSR` asks of a model."""

    @property
    def lr_tile(self) -> int:
        """Side in pixels of the square input the model takes."""

    @property
    def scale_factors(self) -> Sequence[int]:
        """Factors at which the model can give an output."""

    def super_resolve(
        self,
        lr: Tensor,
        *,
        class_id: int = 0,
        factors: Sequence[int] = (1, 2, 4),
        guidance: float = 0.0,
        top_k: int = 1,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> dict[int, Tensor]:
        """`lr` (B, 3, t, t) float32 in [-1, 1] -> {factor: (B, 3, t * factor, t * factor)} in [-1, 1]."""

    def to(self, dtype: torch.dtype) -> Any:
        """The model with its weights in `dtype`."""


@dataclass(frozen=True)
class Upscaled(Generic[ImageT]):
    """The outputs of one image; a factor that was not asked for is None."""

    x1: ImageT | None = None
    x2: ImageT | None = None
    x4: ImageT | None = None


@dataclass(frozen=True)
class UpscaleOptions:
    """How to upscale; see `HitSR.upscale`."""

    scales: Sequence[int] = (1, 2, 4)
    tile: int | None = None
    overlap: int | None = None
    batch: int | None = None
    seed: int = 0
    guidance: float = 0.0
    top_k: int = 1
    top_p: float = 1.0
    colour_fix: bool = True
    class_id: int = 0

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch: expected at least 1, found {self.batch}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 <= seed < 2^63, found {self.seed}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance: expected a finite number of at least 0, found {self.guidance}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 0, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected 0 < top_p <= 1, found {self.top_p}")
        if self.class_id not in (0, 1):
            raise ValueError(f"class_id: expected 0 or 1, found {self.class_id}")


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
        colour_fix_levels: of each factor, see `hitsr_fast.imaging.colour`.
    """

    def __init__(
        self,
        model: SuperResolver,
        device: torch.device | str = "cpu",
        colour_fix_levels: Mapping[int, int] = COLOUR_FIX_LEVELS,
    ) -> None:
        self.model = model
        self.colour_fix_levels = dict(colour_fix_levels)
        self.device = torch.device(device)
        self._float32_model: SuperResolver | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        device: torch.device | str = "auto",
        dtype: torch.dtype | None = None,
    ) -> HitSR:
        """Load a model from `config.json` and `model.safetensors`.

        Args:
            name_or_folder: the name of a packaged model (`hit-tiny`), a local folder, or a Hugging Face hub
                id `owner/name` (needs the `hub` extra), looked for in this order.
            device: `auto` is CUDA where there is one, else the CPU.
            dtype: to compute in; by default see `pick_dtype`.

        Raises:
            ModelNotFoundError: no such model, or one of its two files is missing.
            ValueError: the device is not there, or the files do not fit together.
        """
        from safetensors import SafetensorError

        from hitsr_fast.models.hit_upscaler import HitUpscaler
        from hitsr_fast.models.hit_var import load_pretrained

        device, folder = pick_device(device), find_weights(name_or_folder)
        dtype = pick_dtype(device) if dtype is None else dtype
        try:
            model = HitUpscaler(load_pretrained(folder, device), dtype=dtype)
        except SafetensorError as error:
            raise ValueError(f"model: {folder / 'model.safetensors'} is broken: {error}") from error
        levels = model.config.colour_fix_levels
        return cls(model, device, dict(zip(model.scale_factors, levels, strict=True)))

    def plan(self, height: int, width: int, options: UpscaleOptions) -> TilePlan:
        """The tiles of a `height x width` image.

        Raises:
            ValueError: if `options` asks for a factor, tile or overlap that the model does not have.
        """
        factors, side = tuple(self.model.scale_factors), self.model.lr_tile
        asked = tuple(options.scales)
        if not asked or len(set(asked)) < len(asked) or not set(asked) <= set(factors):
            raise ValueError(f"scales: expected some of {factors}, each once, found {asked}")
        if options.tile not in (None, side):
            raise ValueError(
                f"tile: this model takes tiles of {side} x {side} input pixels only, found {options.tile}"
            )
        overlap = side // 4 if options.overlap is None else options.overlap
        return TilePlan.cover(height, width, side, overlap)

    def upscale(
        self,
        image: ImageT,
        *,
        scales: Sequence[int] = (1, 2, 4),
        tile: int | None = None,
        overlap: int | None = None,
        batch: int | None = None,
        seed: int = 0,
        guidance: float = 0.0,
        top_k: int = 1,
        top_p: float = 1.0,
        colour_fix: bool = True,
        class_id: int = 0,
        progress: Progress | None = None,
    ) -> Upscaled[ImageT]:
        """Restore an image at its own size (x1), twice (x2) and four times (x4) that, in one pass.

        Args:
            image: a PIL image of any mode, or a `(B, 3, H, W)` floating tensor in [0, 1], H and W at least 1.
            scales: which outputs to make.
            tile: side of a tile in input pixels; only the model's own, which is the default.
            overlap: input pixels that neighbouring tiles share at least; a quarter of a tile by default.
            batch: tiles run at once; by default so many that their largest outputs are 2 megapixels, at most
                32.
            seed: of the draws, where `top_k` is not 1.
            guidance: classifier-free guidance, 0 for none.
            top_k: draw among that many codes; 1 is greedy, 0 all of them.
            top_p: draw among the likeliest codes of that total probability.
            colour_fix: take the low frequencies from the input (see `hitsr_fast.imaging.colour`).
            class_id: 0 for photos as they come, 1 for inputs that were only made smaller.
            progress: called with the tiles done and the tiles in all.

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
        options = UpscaleOptions(
            tuple(scales), tile, overlap, batch, seed, guidance, top_k, top_p, colour_fix, class_id
        )
        if isinstance(image, Image.Image):
            pictures = self.upscale_picture(picture_from_pil(image), options, progress)
            return Upscaled(**{f"x{factor}": picture_to_pil(p) for factor, p in pictures.items()})
        return Upscaled(
            **{f"x{factor}": t for factor, t in self._upscale_tensor(image, options, progress).items()}
        )

    def _upscale_tensor(
        self, image: Tensor, options: UpscaleOptions, progress: Progress | None
    ) -> dict[int, Tensor]:
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
            for factor in options.scales
        }

        def read_rows(begin: int, end: int) -> Tensor:
            return image[:, :, begin:end].detach()

        for rows in self.stream(read_rows, height, width, options, progress):
            outputs[rows.factor][:, :, rows.top : rows.top + rows.image.shape[2]] = rows.image
        return outputs

    def upscale_picture(
        self, picture: Picture, options: UpscaleOptions, progress: Progress | None = None
    ) -> dict[int, Picture]:
        """Upscale a decoded image file into pictures held whole; see `stream_picture`.

        Returns:
            A picture for each of `options.scales`. For the errors see `upscale`.
        """
        outputs = {factor: _blank(picture, factor) for factor in options.scales}
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

        Colours are premultiplied for the model, so that what lies under a transparent pixel cannot bleed into
        its neighbours; alpha itself is enlarged by bicubic interpolation.

        Yields:
            Rows of each of `options.scales`, from its top downwards, each row once. For the errors see
            `upscale`.
        """
        height, width, peak = picture.height, picture.width, picture.max_value

        def read_alpha(begin: int, end: int) -> Tensor:
            assert picture.alpha is not None
            return torch.from_numpy(picture.alpha[begin:end].astype(np.float32) / peak)[None, None]

        def read_rows(begin: int, end: int) -> Tensor:
            pixels = picture.pixels[begin:end].astype(np.float32) / peak
            rows = torch.from_numpy(pixels).permute(2, 0, 1)[None].expand(-1, 3, -1, -1)
            return rows if picture.alpha is None else rows * read_alpha(begin, end)

        for factor, top, image in self.stream(read_rows, height, width, options, progress):
            image, quantised_alpha = image.cpu(), None
            if picture.alpha is not None:
                alpha = enlarged_rows(read_alpha, top, top + image.shape[2], height, factor).clamp(0, 1)
                quantised_alpha = _quantised(alpha[0, 0], picture)
                image = (image / alpha.clamp_min(1 / peak)).clamp(max=1)
            if picture.pixels.shape[2] == 1:
                image = image.mean(dim=1, keepdim=True)
            pixels = _quantised(image[0].permute(1, 2, 0), picture)
            yield PictureRows(factor, top, replace(picture, pixels=pixels, alpha=quantised_alpha))

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
            options: see `upscale`.
            progress: see `upscale`.

        Yields:
            Rows of each factor, from its top downwards, each row once.
        """
        plan = self.plan(height, width, options)
        generator = torch.Generator(self.device).manual_seed(options.seed)
        blenders = {factor: RowBlender(plan, factor) for factor in options.scales}
        fixes = {factor: RowColourFix(self.colour_fix_levels[factor]) for factor in options.scales}
        tops = dict.fromkeys(options.scales, 0)
        for band, outputs in enumerate(self._run_bands(read_rows, plan, options, generator, progress)):
            top, last = plan.tops[band], band + 1 == len(plan.tops)
            end = height if last else plan.tops[band + 1]
            for factor in options.scales:
                rows = blenders[factor].add_band(outputs.pop(factor))
                if options.colour_fix:
                    source = enlarged_rows(read_rows, top * factor, end * factor, height, factor)
                    rows = fixes[factor].add_rows(rows, source.to(rows), last)
                if rows.shape[2]:
                    yield Rows(factor, tops[factor], rows.clamp(0, 1))
                    tops[factor] += rows.shape[2]

    def _batch(self, options: UpscaleOptions) -> int:
        """Tiles run at once."""
        side = self.model.lr_tile * max(self.model.scale_factors)
        return min(max(2**21 // side**2, 1), 32) if options.batch is None else options.batch

    def _run_bands(
        self,
        read_rows: ReadRows,
        plan: TilePlan,
        options: UpscaleOptions,
        generator: torch.Generator,
        progress: Progress | None,
    ) -> Iterator[dict[int, Tensor]]:
        """Of each band of tiles, {factor: (n, B, 3, t * factor, t * factor) float32}.

        Bands that a batch has room for are run together.
        """
        n = len(plan.lefts)
        together = max(self._batch(options) // n, 1)
        for first in range(0, len(plan.tops), together):
            tops = plan.tops[first : first + together]
            bands = [read_rows(top, min(top + plan.tile, plan.height)) for top in tops]
            tiles = torch.cat([plan.cut(rows.to(self.device, torch.float32)) for rows in bands])

            def tiles_done(count: int, before: int = first * n, b: int = tiles.shape[1]) -> None:
                if progress is not None:
                    progress(before * b + count, plan.num_tiles * b)

            outputs = self._run_tiles(tiles, plan, first, options, generator, tiles_done)
            for i in range(len(tops)):
                yield {factor: output[i * n : (i + 1) * n] for factor, output in outputs.items()}

    @torch.no_grad()
    def _run_tiles(
        self,
        tiles: Tensor,
        plan: TilePlan,
        first: int,
        options: UpscaleOptions,
        generator: torch.Generator,
        tiles_done: Callable[[int], None],
    ) -> dict[int, Tensor]:
        """(n, B, 3, t, t) tiles in [0, 1] -> {factor: (n, B, 3, t * factor, t * factor) float32}.

        The first of them is that of band `first`.
        """
        n, b = tiles.shape[:2]
        flat, batch = tiles.flatten(0, 1) * 2 - 1, self._batch(options)
        parts: dict[int, list[Tensor]] = {factor: [] for factor in options.scales}
        for begin in range(0, n * b, batch):
            lr = flat[begin : begin + batch]
            outputs = self._super_resolve(self.model, lr, options, generator)
            for i in _non_finite(outputs):
                # Half precision can overflow on a rare tile; in float32 the same tile is fine.
                again = self._super_resolve(self._in_float32(), lr[i : i + 1], options, generator)
                if _non_finite(again):
                    band, column = divmod((begin + i) // b, len(plan.lefts))
                    raise NonFiniteOutputError(
                        "the model gave NaN or infinity, in float32 too, "
                        f"for the tile at input pixel x={plan.lefts[column]}, y={plan.tops[first + band]}"
                    )
                for factor, output in outputs.items():
                    output[i] = again[factor][0]
            for factor, output in outputs.items():
                parts[factor].append(output)
            tiles_done(begin + len(lr))
        return {factor: torch.stack(torch.cat(part).split(b)) for factor, part in parts.items()}

    def _super_resolve(
        self, model: SuperResolver, lr: Tensor, options: UpscaleOptions, generator: torch.Generator
    ) -> dict[int, Tensor]:
        outputs = model.super_resolve(
            lr,
            class_id=options.class_id,
            factors=tuple(options.scales),
            guidance=options.guidance,
            top_k=options.top_k,
            top_p=options.top_p,
            generator=generator,
        )
        return {factor: outputs[factor].float() * 0.5 + 0.5 for factor in options.scales}

    def _in_float32(self) -> SuperResolver:
        if self._float32_model is None:
            model: SuperResolver = copy.deepcopy(self.model).to(torch.float32)
            self._float32_model = model
        return self._float32_model


def _non_finite(outputs: dict[int, Tensor]) -> list[int]:
    bad = torch.stack([~output.isfinite().flatten(1).all(dim=1) for output in outputs.values()]).any(dim=0)
    return [int(i) for i in bad.nonzero()]


def _quantised(x: Tensor, like: Picture) -> np.ndarray[Any, Any]:
    return (x * like.max_value).round().numpy().astype(like.pixels.dtype)


def _blank(picture: Picture, factor: int) -> Picture:
    """A picture `factor` times as large, whose samples are not set."""
    height, width, channels = picture.pixels.shape
    size, dtype = (height * factor, width * factor), picture.pixels.dtype
    return replace(
        picture,
        pixels=np.empty((*size, channels), dtype),
        alpha=None if picture.alpha is None else np.empty(size, dtype),
    )


def enlarged_rows(read_rows: ReadRows, begin: int, end: int, height: int, factor: int) -> Tensor:
    """Some rows of an image enlarged by bicubic interpolation, from the rows that they depend on only.

    Args:
        read_rows: `(begin, end)` -> those rows of the image as (B, C, end - begin, W) floating.
        begin: first row of the enlarged image.
        end: one past the last.
        height: rows of the image.
        factor: how much larger.

    Returns:
        (B, C, end - begin, W * factor), not clamped.
    """
    first = max(begin // factor - _BICUBIC_REACH, 0)
    stop = min(-(-end // factor) + _BICUBIC_REACH, height)
    rows = read_rows(first, stop)
    if factor > 1:
        rows = F.interpolate(rows, scale_factor=factor, mode="bicubic", align_corners=False)
    return rows[:, :, begin - first * factor : end - first * factor]


def pick_device(device: torch.device | str) -> torch.device:
    """The device of that name; `auto` is CUDA where there is one, else the CPU.

    Raises:
        ValueError: if it is CUDA and torch sees no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no CUDA device")
    return device


def pick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, where it is far faster; else float32."""
    if device.type == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16


def packaged_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(folder.parent.name for folder in WEIGHTS.glob("*/model.safetensors"))


def find_weights(name_or_folder: str | Path) -> Path:
    """The folder with the two files of a model; see `HitSR.from_pretrained`."""
    name = str(name_or_folder)
    if name in packaged_models():
        return WEIGHTS / name
    folder = Path(name_or_folder)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
            packaged = ", ".join(packaged_models()) or "there are none"
            raise ModelNotFoundError(
                f"model: {name!r} is no packaged model ({packaged}), no folder and no hub id owner/name"
            )
        folder = _fetched_from_hub(name)
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise ModelNotFoundError(f"model: {folder} has no {file}")
    return folder


def _fetched_from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ModelNotFoundError(
            f"model: there is no folder {name!r}, and to look on the hub huggingface_hub is needed: "
            "pip install 'hitsr-fast[hub]'"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelNotFoundError(f"model: {name!r} could not be fetched from the hub: {error}") from error
