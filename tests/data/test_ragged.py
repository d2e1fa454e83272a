"""Images of different sizes in one tensor: each comes out as it does alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.data.blur_kernels import gaussian_kernel
from hitsr_fast.data.jpeg import jpeg, jpeg_of_sizes
from hitsr_fast.data.ragged import RESIZE_MODES, Size, blur, inside, on, padded, resize
from tests.tolerances import TOLERANCES

SIDES = st.integers(1, 40)
SIZES = st.lists(st.tuples(SIDES, SIDES), min_size=2, max_size=4)


def pictures(sizes: Sequence[Size]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    return [torch.rand(1, 3, *size, generator=generator) for size in sizes]


def canvas(images: Sequence[Tensor], rest: float = 0.7) -> Tensor:
    """All in one tensor, with some number around them."""
    shape = (max(image.shape[-2] for image in images) + 1, max(image.shape[-1] for image in images) + 2)
    whole = torch.full((len(images), 3, *shape), rest)
    for row, image in zip(whole, images, strict=True):
        row[:, : image.shape[-2], : image.shape[-1]] = image[0]
    return whole


def parts(whole: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    return [whole[i : i + 1, :, :rows, :columns] for i, (rows, columns) in enumerate(sizes)]


@given(SIZES, SIZES, st.lists(st.sampled_from(RESIZE_MODES), min_size=4, max_size=4))
@settings(max_examples=40)
def test_resize_is_pytorchs(sizes: list[Size], new_sizes: list[Size], modes: list[str]) -> None:
    count = min(len(sizes), len(new_sizes))
    sizes, new_sizes, modes = sizes[:count], new_sizes[:count], modes[:count]
    images = pictures(sizes)
    shape = (max(rows for rows, _ in new_sizes), max(columns for _, columns in new_sizes))
    resized = resize(canvas(images), sizes, new_sizes, modes, shape)
    assert resized.shape == (count, 3, *shape)
    for image, size, mode, out in zip(images, new_sizes, modes, parts(resized, new_sizes), strict=True):
        expected = torch.nn.functional.interpolate(image, size=size, mode=mode)
        torch.testing.assert_close(out, expected, **TOLERANCES["float32_reordered"]._asdict())
        alone = resize(image, [tuple(image.shape[-2:])], [size], [mode], size)  # type: ignore[list-item]
        torch.testing.assert_close(alone, expected, **TOLERANCES["float32_reordered"]._asdict())


@given(SIZES)
@settings(max_examples=20)
def test_blur_in_a_batch_is_blur_alone(sizes: list[Size]) -> None:
    images = pictures(sizes)
    kernels = [gaussian_kernel(3 + 6 * i, 0.5 + i, 1.0, 0.5) for i in range(len(sizes))]
    blurred = blur(canvas(images), sizes, kernels)
    for image, size, kernel, out in zip(images, sizes, kernels, parts(blurred, sizes), strict=True):
        expected = blur(image.double(), [size], [kernel]).float()
        torch.testing.assert_close(out, expected, **TOLERANCES["float32_reordered"]._asdict())


@given(SIZES, st.integers(1, 100))
@settings(max_examples=20)
def test_jpeg_in_a_batch_is_jpeg_alone(sizes: list[Size], quality: int) -> None:
    images = pictures(sizes)
    qualities = [(quality + 37 * i) % 100 + 1 for i in range(len(sizes))]
    coded = jpeg_of_sizes(canvas(images), sizes, qualities)
    for image, each, out in zip(images, qualities, parts(coded, sizes), strict=True):
        assert (out - jpeg(image, each)).abs().mean() <= TOLERANCES["jpeg_mean"].atol


def test_jpeg_in_a_batch_does_not_look_beyond_an_image() -> None:
    """Its last pixels too are as alone, though the blocks after them hold another chroma."""
    sizes = [(16, 32), (24, 20)]
    images = pictures(sizes)
    coded = jpeg_of_sizes(canvas(images), sizes, [20, 20])
    for image, out in zip(images, parts(coded, sizes), strict=True):
        assert (out != jpeg(image, 20)).float().mean() < 0.01


def test_padding_goes_on_with_the_edges() -> None:
    image = torch.arange(6.0).view(1, 1, 2, 3).expand(1, 3, 2, 3)
    whole = canvas([image, torch.zeros(1, 3, 4, 4)])
    expected = np.pad(image[0].numpy(), ((0, 0), (0, 6), (0, 5)), mode="edge")
    assert padded(whole, [(2, 3), (4, 4)], 8).shape == (2, 3, 8, 8)
    assert (padded(whole, [(2, 3), (4, 4)], 8)[0].numpy() == expected).all()
    assert (padded(image, [(2, 3)], 8)[0].numpy() == expected).all()


def test_inside() -> None:
    mask = inside([(1, 2), (2, 1)], (2, 3), torch.device("cpu"))
    assert mask is not None
    assert mask[:, 0].tolist() == [[[True, True, False], [False] * 3], [[True, False, False]] * 2]
    assert inside([(2, 3)], (2, 3), torch.device("cpu")) is None


@pytest.mark.parametrize("chosen", [[], [1], [0, 2], [0, 1, 2]])
def test_some_of_a_batch(chosen: list[int]) -> None:
    images = torch.zeros(3, 1)
    changed = on(images, chosen, lambda part: part + 1 + torch.arange(len(part))[:, None])
    assert changed.flatten().tolist() == [chosen.index(i) + 1 if i in chosen else 0 for i in range(3)]
    assert not images.any()
