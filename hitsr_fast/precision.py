"""What products and convolutions compute in: exact float32 where it is asked for, and autocast's dtype."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_EXACT = ("ieee", "none")
_BACKENDS: Any = torch.backends  # whose stubs lack the precisions


class _Float32:
    """What PyTorch allows inside products and convolutions of float32, and how it is taken back for a while.

    The settings are the process's. So calls that overlap, in threads, share one change: the first to come
    saves them and the last to leave restores them.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._matmul: str | None = None
        self._saved: list[tuple[Any, str]] = []

    def hold(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._save()
            self._inside += 1

    def release(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore()

    def _save(self) -> None:
        products = (_BACKENDS.cuda.matmul, _BACKENDS.mkldnn.matmul)
        places = (*products, _BACKENDS.cudnn.conv, _BACKENDS.mkldnn.conv)
        if all(place.fp32_precision in _EXACT for place in places):
            self._saved, self._matmul = [], None
            return
        self._saved = [(place, place.fp32_precision) for place in places]
        # PyTorch's profiler refuses to run where the older setting and the newer ones disagree: both are set.
        inexact = any(place.fp32_precision not in _EXACT for place in products)
        self._matmul = _float32_matmul_precision() if inexact else None
        if self._matmul is not None:
            torch.set_float32_matmul_precision("highest")
        for place, _ in self._saved:
            place.fp32_precision = "ieee"

    def _restore(self) -> None:
        if self._matmul is not None:
            torch.set_float32_matmul_precision(self._matmul)
        for place, precision in self._saved:
            # One that had no setting of its own goes on to follow `torch.backends.fp32_precision`. By default
            # that of cuDNN's convolutions is the only one that has.
            if place is not _BACKENDS.cudnn.conv:
                place.fp32_precision = "none"
            if place.fp32_precision != precision:
                place.fp32_precision = precision


def _float32_matmul_precision() -> str | None:
    """The older setting, or None where the newer ones contradict it: PyTorch refuses to read it then."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


_float32 = _Float32()


@contextmanager
def exact_float32() -> Iterator[None]:
    """In this context products and convolutions of float32 are of float32; after it all is as before."""
    _float32.hold()
    try:
        yield
    finally:
        _float32.release()


def autocast_dtype(device: torch.device | str) -> torch.dtype | None:
    """What autocast, where it is on for this kind of device, computes products in; None where it is off."""
    kind = torch.device(device).type
    # Of a device that knows no autocast, such as "meta", PyTorch refuses to say that it is off.
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
