"""Images of any size and kind through a model that sees square tiles only."""

from hitsr_fast.models.base import SuperResolver
from hitsr_fast.models.hub import ModelNotFoundError, find_weights, packaged_models
from hitsr_fast.pipeline.devices import pick_device, pick_dtype
from hitsr_fast.pipeline.hit_sr import HitSR, PictureRows, Rows, Upscaled
from hitsr_fast.pipeline.options import UpscaleOptions
from hitsr_fast.pipeline.tiles import NonFiniteOutputError, Progress, ReadRows

__all__ = [
    "HitSR",
    "ModelNotFoundError",
    "NonFiniteOutputError",
    "PictureRows",
    "Progress",
    "ReadRows",
    "Rows",
    "SuperResolver",
    "UpscaleOptions",
    "Upscaled",
    "find_weights",
    "packaged_models",
    "pick_device",
    "pick_dtype",
]
