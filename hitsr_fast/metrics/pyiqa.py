"""MUSIQ, MANIQA and CLIP-IQA through the package pyiqa, where a user has installed it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from hitsr_fast.metrics._pairs import inner_image


def missing() -> str | None:
    """Why pyiqa's metrics cannot be measured here; None where they can."""
    if importlib.util.find_spec("pyiqa") is None:
        licence = "licence PolyForm Noncommercial, so it is for you to decide"
        return f"pyiqa is not installed: pip install pyiqa ({licence})"
    return None


@functools.lru_cache(maxsize=8)
def metric_of(name: str, device: torch.device) -> Any:
    """A metric of pyiqa on a device, kept for the next call."""
    return importlib.import_module("pyiqa").create_metric(name, device=device)


def measure(name: str, images: Tensor, border: int = 0, *, min_side: int = 1) -> Tensor:
    """A no-reference metric that pyiqa has, on the images' device.

    Args:
        name: as `pyiqa.create_metric` takes it.
        images: floating point, `(B, 3, H, W)` RGB in [0, 1].
        border: pixels left out on each side.
        min_side: smallest side that must be left.

    Returns:
        float32 `(B,)`.

    Raises:
        ImportError: pyiqa is not installed.
        TypeError, ValueError: other arguments than these.
    """
    inside = inner_image("images", images, border=border, min_side=min_side).float()
    if reason := missing():
        raise ImportError(f"{name}: {reason}")
    metric = metric_of(name, images.device)
    with torch.inference_mode():
        return torch.cat([metric(image).reshape(1) for image in inside.split(1)]).float()
