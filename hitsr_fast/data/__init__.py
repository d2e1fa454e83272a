"""Training data: sources of photos, crops of them, and low-resolution inputs made from those.

Names are imported on first use: a recipe names its sources without torch.
"""

from typing import TYPE_CHECKING

from hitsr_fast._lazy import lazy

if TYPE_CHECKING:
    from hitsr_fast.data.degradation import clean_pair, degrade, lr_pair
    from hitsr_fast.data.degradation_config import DegradationConfig, OrderConfig
    from hitsr_fast.data.folder import NoPhotosError, PhotoFolder, photo_names, split
    from hitsr_fast.data.presets import load_preset, preset_names
    from hitsr_fast.data.source_config import SourceConfig
    from hitsr_fast.data.sources import Sources, open_source, open_sources

__all__ = [
    "DegradationConfig",
    "NoPhotosError",
    "OrderConfig",
    "PhotoFolder",
    "SourceConfig",
    "Sources",
    "clean_pair",
    "degrade",
    "load_preset",
    "lr_pair",
    "open_source",
    "open_sources",
    "photo_names",
    "preset_names",
    "split",
]

__getattr__ = lazy(
    __name__,
    degradation=["clean_pair", "degrade", "lr_pair"],
    degradation_config=["DegradationConfig", "OrderConfig"],
    folder=["NoPhotosError", "PhotoFolder", "photo_names", "split"],
    presets=["load_preset", "preset_names"],
    source_config=["SourceConfig"],
    sources=["Sources", "open_source", "open_sources"],
)
