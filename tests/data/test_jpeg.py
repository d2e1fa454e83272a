"""JPEG as a tensor operation against Pillow's libjpeg."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hitsr_fast.data.jpeg import jpeg
from tests.tolerances import TOLERANCES


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth colours, edges and some grain: what JPEG is made for, and a bit more."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.int16) + rng.integers(-6, 7, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return torch.from_numpy(pixels.clip(0, 255)).permute(2, 0, 1)[None].float() / 255


def pillow_jpeg(image: Tensor, quality: int) -> Tensor:
    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    decoded = np.array(Image.open(buffer))
    return torch.from_numpy(decoded).permute(2, 0, 1)[None].float() / 255


@given(
    quality=st.integers(30, 100),
    height=st.integers(48, 100),
    width=st.integers(48, 100),
    seed=st.integers(0, 99),
)
def test_matches_pillow(quality: int, height: int, width: int, seed: int) -> None:
    image = picture(height, width, seed)
    ours, theirs = jpeg(image, quality), pillow_jpeg(image, quality)
    assert (ours - theirs).abs().mean() <= TOLERANCES["jpeg_mean"].atol


@pytest.mark.parametrize("quality", [10, 50, 90])
def test_error_is_pillows_not_just_small(quality: int) -> None:
    """The artefacts themselves agree: they correlate with libjpeg's."""
    image = picture(96, 128)
    ours, theirs = jpeg(image, quality) - image, pillow_jpeg(image, quality) - image
    correlation = torch.corrcoef(torch.stack((ours.flatten(), theirs.flatten())))[0, 1]
    assert correlation > 0.95


def test_lower_quality_loses_more() -> None:
    image = picture(64, 64)
    losses = [(jpeg(image, quality) - image).square().mean().item() for quality in (95, 75, 50, 30, 10)]
    assert losses == sorted(losses)


def test_flat_grey_is_kept() -> None:
    grey = torch.full((1, 3, 20, 24), 128 / 255)
    assert torch.equal(jpeg(grey, 30), grey)


def test_a_batch_is_its_images() -> None:
    images = torch.cat((picture(24, 40, 1), picture(24, 40, 2)))
    assert torch.equal(jpeg(images, 60)[1:], jpeg(images[1:], 60))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="images"):
        jpeg(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 50)
    with pytest.raises(ValueError, match="images"):
        jpeg(torch.zeros(3, 8, 8), 50)
    with pytest.raises(ValueError, match="quality"):
        jpeg(torch.zeros(1, 3, 8, 8), 0)
