"""The unsharp mask against OpenCV's blur, and against its formula in NumPy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.data.sharpen import unsharp_mask
from tests.tolerances import TOLERANCES

Array = npt.NDArray[np.float64]


def picture(height: int, width: int) -> Array:
    y, x, channel = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return ((x * x + 7 * y * (channel + 1) + 60 * (x // 9 % 2)) % 256) / 255


def as_tensor(image: Array) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float()


# Levels of `picture(40, 56)[::13, ::11]` after sharpening, red, green and blue. Made with opencv-python 5.0:
#     def smooth(x): return cv2.GaussianBlur(x, (51, 51), 0)
#     image = np.float32(picture(40, 56)); difference = image - smooth(image)
#     mask = smooth(np.float32(np.abs(difference) * 255 > 10))
#     (mask * np.clip(image + 0.5 * difference, 0, 1) + (1 - mask) * image)[::13, ::11].reshape(-1, 3) * 255
OPENCV = """
0.000 0.000 0.000  213.819 209.664 207.672  252.494 252.740 252.819  125.162 124.437 123.057
152.370 151.583 150.838  245.865 245.631 245.450  80.624 208.184 1.322  1.863 98.062 231.261
32.319 166.498 254.240  251.873 16.180 148.121  253.433 43.343 176.174  4.035 137.997 252.825
198.304 99.092 2.562  93.674 2.424 252.017  166.310 57.930 0.458  15.642 253.378 173.574
43.305 254.772 201.459  138.949 30.239 254.053  0.666 1.807 16.005  232.154 252.493 253.465
254.262 0.433 1.747  150.477 174.189 199.460  178.056 201.698 226.971  253.007 253.903 0.326
"""


def test_is_opencvs() -> None:
    sharp = unsharp_mask(as_tensor(picture(40, 56)))[0].permute(1, 2, 0) * 255
    expected = torch.tensor([float(level) for level in OPENCV.split()]).view(-1, 3)
    torch.testing.assert_close(sharp[::13, ::11].reshape(-1, 3), expected, rtol=0, atol=2e-3)


def plain(image: Array, weight: float, radius: int, threshold: float) -> Array:
    """The formula, by a sum over all places of the kernel."""
    side = radius + (radius % 2 == 0)
    sigma = 0.3 * ((side - 1) * 0.5 - 1) + 0.8
    at = np.arange(side) - side // 2
    kernel = np.exp(-(at[:, None] ** 2 + at**2) / (2 * sigma**2))

    def smooth(channels: Array) -> Array:
        height, width, _ = channels.shape
        padded = np.pad(channels, ((side // 2,) * 2, (side // 2,) * 2, (0, 0)), mode="reflect")
        total = np.zeros_like(channels)
        for row in range(side):
            for column in range(side):
                total += kernel[row, column] * padded[row : row + height, column : column + width]
        return total / kernel.sum()

    difference = image - smooth(image)
    mask = smooth((np.abs(difference) * 255 > threshold).astype(np.float64))
    result: Array = mask * np.clip(image + weight * difference, 0, 1) + (1 - mask) * image
    return result


@given(
    st.integers(1, 60), st.integers(1, 60), st.sampled_from([(0.5, 50, 10.0), (2.0, 7, 0.0), (1.0, 16, 25.3)])
)
@settings(max_examples=12)
def test_is_its_formula_at_any_size(height: int, width: int, options: tuple[float, int, float]) -> None:
    image = picture(height, width)
    sharp = unsharp_mask(as_tensor(image), *options)
    expected = as_tensor(plain(image, *options))
    torch.testing.assert_close(sharp, expected, **TOLERANCES["float32_reordered"]._asdict())


def test_what_is_smooth_stays() -> None:
    flat = torch.full((1, 3, 40, 40), 0.3)
    assert torch.equal(unsharp_mask(flat), flat)
    image = as_tensor(picture(40, 56))
    torch.testing.assert_close(unsharp_mask(image, 0.0), image, rtol=0, atol=1e-6)
    torch.testing.assert_close(unsharp_mask(image, 0.5, 50, 256.0), image, rtol=0, atol=1e-6)


def test_a_batch_is_its_images() -> None:
    images = torch.cat((as_tensor(picture(32, 40)), as_tensor(picture(32, 40)).flip(2)))
    torch.testing.assert_close(unsharp_mask(images)[1:], unsharp_mask(images[1:]), rtol=0, atol=1e-6)
    sharp = unsharp_mask(images)
    assert sharp.min() >= 0 and sharp.max() <= 1


def test_bad_arguments() -> None:
    image = as_tensor(picture(8, 8))
    with pytest.raises(TypeError, match="images"):
        unsharp_mask(image.byte())
    with pytest.raises(ValueError, match="images"):
        unsharp_mask(image[0])
    with pytest.raises(ValueError, match="images"):
        unsharp_mask(image[..., :0])
    with pytest.raises(ValueError, match="weight"):
        unsharp_mask(image, -1.0)
    with pytest.raises(ValueError, match="radius"):
        unsharp_mask(image, 0.5, 0)
    with pytest.raises(ValueError, match="threshold"):
        unsharp_mask(image, threshold=-1)
