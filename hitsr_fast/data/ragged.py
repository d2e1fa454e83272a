"""Image operations on a batch whose images differ in size, and in what is done to each.

Each image lies in the upper left corner of its part of the tensor; what is around it has no meaning, but is
finite. Sizes and parameters are known on the CPU, so that nothing is read back from a device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.transfer import to_device

RESIZE_MODES: Final = ("area", "bilinear", "bicubic")

Size = tuple[int, int]
"""Height and width."""

_Index = npt.NDArray[np.int64]


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Where 8-bit levels are rounded to, 16 bits do not do."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def on(images: Tensor, chosen: Sequence[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """The batch with some of its images changed, to others of the same shape."""
    if not chosen:
        return images
    if len(chosen) == len(images):
        return change(images)
    index = to_device(torch.tensor(chosen), images.device)
    return images.index_copy(0, index, change(images.index_select(0, index)))


def blur(images: Tensor, sizes: Sequence[Size], kernels: Sequence[Tensor]) -> Tensor:
    """Convolve the channels of each of `(B, C, H, W)` with an odd square kernel, mirrored at its borders.

    By FFT: a 21 x 21 kernel costs no more than a small one, on any device.
    """
    height, width = images.shape[-2:]
    radius = max(kernel.shape[0] // 2 for kernel in kernels)
    taps = torch.zeros(len(kernels), 1, 2 * radius + 1, 2 * radius + 1, dtype=images.dtype)
    for i, kernel in enumerate(kernels):
        edge = radius - kernel.shape[0] // 2
        taps[i, 0, edge : edge + kernel.shape[0], edge : edge + kernel.shape[0]] = kernel
    if radius < min(height, width) and all(size == (height, width) for size in sizes):
        mirrored = F.pad(images, (radius,) * 4, mode="reflect")
    else:
        mirrored = _gathered(
            images,
            _for_each([size[0] for size in sizes], lambda length: _mirrored(height, radius, length)),
            _for_each([size[1] for size in sizes], lambda length: _mirrored(width, radius, length)),
        )
    shape = (_fft_length(height + 2 * radius), _fft_length(width + 2 * radius))
    spectrum = torch.fft.rfft2(mirrored, s=shape) * torch.fft.rfft2(to_device(taps, images.device), s=shape)
    full: Tensor = torch.fft.irfft2(spectrum, s=shape)
    return full[..., 2 * radius : 2 * radius + height, 2 * radius : 2 * radius + width]


def resize(
    images: Tensor, sizes: Sequence[Size], new_sizes: Sequence[Size], modes: Sequence[str], shape: Size
) -> Tensor:
    """Resize each of `(B, C, H, W)` as `F.interpolate` does, without antialiasing, to `(B, C, *shape)`.

    `shape` is that of the new tensor, at least as large as any of the new sizes.
    """
    if len({*zip(sizes, new_sizes, modes, strict=True)}) == 1:
        if sizes[0] == images.shape[-2:] == shape:
            return images
        # PyTorch's own mean over an area takes up to four times as long as two weighted sums.
        if modes[0] != "area" and sizes[0] == images.shape[-2:] and new_sizes[0] == shape:
            return F.interpolate(images, size=shape, mode=modes[0])
    for axis in (0, 1):
        lengths = [(old[axis], new[axis]) for old, new in zip(sizes, new_sizes, strict=True)]
        images = _resized_axis(images, axis, lengths, modes, shape[axis])
    return images


def padded(images: Tensor, sizes: Sequence[Size], multiple: int) -> Tensor:
    """Repeat each image's last row and column, so that they go on to the tensor's end.

    The tensor's sides are rounded up to a multiple.
    """
    height, width = (-(-side // multiple) * multiple for side in images.shape[-2:])
    if all(size == images.shape[-2:] for size in sizes):
        edges = (0, width - images.shape[-1], 0, height - images.shape[-2])
        return F.pad(images, edges, mode="replicate") if any(edges) else images
    return _gathered(
        images,
        _for_each([size[0] for size in sizes], lambda length: np.minimum(np.arange(height), length - 1)),
        _for_each([size[1] for size in sizes], lambda length: np.minimum(np.arange(width), length - 1)),
    )


def inside(sizes: Sequence[Size], shape: Size, device: torch.device) -> Tensor | None:
    """Which pixels of a tensor are of an image, bool `(B, 1, *shape)`; None if all are."""
    if all(size == shape for size in sizes):
        return None
    height, width = to_device(torch.tensor(sizes), device).T[:, :, None, None, None]
    rows = torch.arange(shape[0], device=device)[:, None]
    columns = torch.arange(shape[1], device=device)
    mask: Tensor = (rows < height) & (columns < width)
    return mask


def _gathered(images: Tensor, rows: _Index, columns: _Index) -> Tensor:
    """`images[b, :, rows[b], columns[b]]`; indices `(B, h)` and `(B, w)`, or `(1, h)` for all images."""
    row, column = (to_device(torch.from_numpy(index), images.device) for index in (rows, columns))
    if len(rows) == len(columns) == 1:
        return images[:, :, row[0][:, None], column[0]]
    image = torch.arange(images.shape[0], device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[image, channel, row[:, None, :, None], column[:, None, None, :]]


def _for_each(lengths: Sequence[int], index: Callable[[int], _Index]) -> _Index:
    """The index of each length, one row if all are the same."""
    if len(set(lengths)) == 1:
        lengths = lengths[:1]
    return np.stack([index(length) for length in lengths])


def _mirrored(side: int, radius: int, length: int) -> _Index:
    """Indices -radius .. side + radius - 1 reflected into the image; unlike `F.pad`, for any radius."""
    period = max(1, 2 * (length - 1))
    index = np.arange(-radius, side + radius) % period
    return np.minimum(index, period - index)


@lru_cache(maxsize=1024)
def _fft_length(length: int) -> int:
    """Next multiple of 4 without prime factors above 7: 540 takes half as long as 544, which has a 17."""
    length = -(-length // 4) * 4
    rest = length
    for factor in (2, 3, 5, 7):
        while rest % factor == 0:
            rest //= factor
    return length if rest == 1 else _fft_length(length + 4)


def _resized_axis(
    images: Tensor, axis: int, lengths: Sequence[tuple[int, int]], modes: Sequence[str], side: int
) -> Tensor:
    """Resize rows (axis 0) or columns (1) by weighted sums of gathered ones."""
    kinds = [(old, new, mode) for (old, new), mode in zip(lengths, modes, strict=True)]
    taps = [_taps(*kind) for kind in (kinds[:1] if len(set(kinds)) == 1 else kinds)]
    most = max(len(index) for index, _ in taps)
    indices = np.zeros((most, len(taps), side), np.int64)
    weights = np.zeros((most, len(taps), side), np.float32)
    for i, (index, weight) in enumerate(taps):
        indices[: len(index), i, : index.shape[1]] = index
        weights[: len(index), i, : index.shape[1]] = weight
    shape = (most, len(taps), 1, side, 1) if axis == 0 else (most, len(taps), 1, 1, side)
    index_of = to_device(torch.from_numpy(indices), images.device).view(shape)
    weight_of = to_device(torch.from_numpy(weights), images.device).view(shape)
    size = list(images.shape)
    size[2 + axis] = side
    total = images.new_zeros(size)
    for index, weight in zip(index_of, weight_of, strict=True):
        if axis == 0 and len(taps) == 1:  # whole rows, a fifth of the time
            total.addcmul_(images.index_select(2, index.flatten()), weight)
        else:
            total.addcmul_(images.gather(2 + axis, index.expand(size)), weight)
    return total


def _taps(old: int, new: int, mode: str) -> tuple[_Index, npt.NDArray[np.float32]]:
    """Which old positions each new one is a sum of, and their weights: both `(taps, new)`."""
    at = np.arange(new)
    if mode == "area":
        first, last = at * old // new, -(-(at + 1) * old // new)
        offsets = np.arange(int((last - first).max()))[:, None]
        share = (first + offsets < last) / (last - first)
        return np.minimum(first + offsets, old - 1), share.astype(np.float32)
    source = (at.astype(np.float32) + np.float32(0.5)) * np.float32(old / new) - np.float32(0.5)
    if mode == "bilinear":
        source = source.clip(0)
    floor = np.floor(source).astype(np.int64)
    part = source - floor.astype(np.float32)
    if mode == "bilinear":
        offsets, weight = np.arange(2)[:, None], np.stack([1 - part, part])
    else:
        distance = np.abs(part - np.arange(-1, 3, dtype=np.float32)[:, None])
        offsets, weight = np.arange(-1, 3)[:, None], _cubic(distance)
    return np.clip(floor + offsets, 0, old - 1), weight.astype(np.float32)


def _cubic(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Keys' kernel at distances up to 2, with PyTorch's a of -0.75."""
    a = -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, far)
