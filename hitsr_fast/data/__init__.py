"""Training data: photos from folders, and low-resolution inputs made from them."""

from hitsr_fast.data.degradation import clean_pair, degrade, lr_pair
from hitsr_fast.data.degradation_config import DegradationConfig, OrderConfig
from hitsr_fast.data.folder import NoPhotosError, PhotoFolder, photo_names, split

__all__ = [
    "DegradationConfig",
    "NoPhotosError",
    "OrderConfig",
    "PhotoFolder",
    "clean_pair",
    "degrade",
    "lr_pair",
    "photo_names",
    "split",
]
