"""Each stage of the degradation, and all together, against implementations that share no code with it."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from benchmarks.peers import degradation as plain
from hitsr_fast.data import degradation
from hitsr_fast.data.blur_kernels import gaussian_kernel, sinc_kernel
from hitsr_fast.data.degradation import degrade
from hitsr_fast.data.degradation_config import PRESETS, REAL_ESRGAN, DegradationConfig
from hitsr_fast.data.jpeg import jpeg
from hitsr_fast.data.ragged import resize
from tests.tolerances import TOLERANCES

Array = npt.NDArray[np.float64]


def photo(side: int, count: int = 1) -> Tensor:
    """Edges of all directions, shades and some grain: `(count, 3, side, side)` in [0, 1]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    images = []
    for _ in range(count):
        waves = [
            np.sin(rng.uniform(3, 40) * (x * math.cos(a) + y * math.sin(a))) for a in rng.uniform(0, 3, 3)
        ]
        image = np.stack(waves) * 0.3 + 0.5 + (np.hypot(x - 0.5, y - 0.4) < 0.3) * 0.2
        images.append(image + rng.normal(0, 0.02, image.shape))
    return torch.from_numpy(np.stack(images)).clamp(0, 1).float()


# Real-ESRGAN's options/train_realesrgan_x4plus.yml (commit 00116244) and VARSR's dataloader, in their words.
PUBLIC: dict[str, dict[str, Any]] = {
    "x4plus": {
        "resize_prob": (0.2, 0.7, 0.1),
        "resize_range": (0.15, 1.5),
        "noise_range": (1, 30),
        "poisson_scale_range": (0.05, 3),
        "jpeg_range": (30, 95),
        "second_blur_prob": 0.8,
        "resize_prob2": (0.3, 0.4, 0.3),
        "resize_range2": (0.3, 1.2),
        "noise_range2": (1, 25),
        "poisson_scale_range2": (0.05, 2.5),
        "jpeg_range2": (30, 95),
    },
    "varsr": {
        "resize_prob": (0.2, 0.7, 0.1),
        "resize_range": (0.3, 1.5),
        "noise_range": (1, 15),
        "poisson_scale_range": (0.05, 2.0),
        "jpeg_range": (60, 95),
        "second_blur_prob": 0.5,
        "resize_prob2": (0.3, 0.4, 0.3),
        "resize_range2": (0.6, 1.2),
        "noise_range2": (1, 12),
        "poisson_scale_range2": (0.05, 1.0),
        "jpeg_range2": (60, 100),
    },
}
BOTH_HAVE = {
    "gaussian_noise_prob": 0.5,
    "gray_noise_prob": 0.4,
    "sinc_prob": 0.1,
    "blur_sigma": (0.2, 3),
    "gaussian_noise_prob2": 0.5,
    "gray_noise_prob2": 0.4,
    "sinc_prob2": 0.1,
    "blur_sigma2": (0.2, 1.5),
}
OUR_NAMES = {
    "resize_prob": "resize_probs",
    "resize_range": "resize_range",
    "gaussian_noise_prob": "gaussian_noise_prob",
    "noise_range": "gaussian_noise_range",
    "poisson_scale_range": "poisson_scale_range",
    "gray_noise_prob": "gray_noise_prob",
    "jpeg_range": "jpeg_range",
    "sinc_prob": "sinc_prob",
    "blur_sigma": "sigma_range",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_presets_have_the_public_numbers(name: str) -> None:
    config, public = PRESETS[name], BOTH_HAVE | PUBLIC[name]
    for order, mark in ((config.first, ""), (config.second, "2")):
        for theirs, ours in OUR_NAMES.items():
            assert getattr(order, ours) == public[theirs + mark], (theirs, mark)
    assert (config.first.blur_prob, config.second.blur_prob) == (1, public["second_blur_prob"])
    assert config.kernel_probs == (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    assert config.kernel_sizes == tuple(2 * v + 1 for v in range(3, 11))
    assert config.generalized_beta_range == (0.5, 4)  # betag_range
    assert config.plateau_beta_range == (1, 2)  # betap_range
    assert config.final_sinc_prob == 0.8
    assert config.float_quality


@given(
    st.integers(0, 10).map(lambda half: 2 * half + 1),
    st.floats(0.2, 3),
    st.floats(0.2, 3),
    st.floats(-math.pi, math.pi),
    st.floats(0.5, 4),
)
@settings(max_examples=30)
def test_kernels_are_their_formulas(
    size: int, sigma_x: float, sigma_y: float, angle: float, beta: float
) -> None:
    turned = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    inverse = np.linalg.inv(turned @ np.diag([sigma_x**2, sigma_y**2]) @ turned.T)
    q = np.empty((size, size))
    for row in range(size):
        for column in range(size):
            at = np.array([column - size // 2, row - size // 2])
            q[row, column] = at @ inverse @ at
    profiles = {
        "gaussian": np.exp(-q / 2),
        "generalized": np.exp(-(q**beta) / 2),
        "plateau": 1 / (q**beta + 1),
    }
    for profile, expected in profiles.items():
        kernel = gaussian_kernel(size, sigma_x, sigma_y, angle, profile=profile, beta=beta).numpy()
        np.testing.assert_allclose(kernel, expected / expected.sum(), rtol=1e-9, atol=1e-12)


@given(st.integers(3, 10).map(lambda half: 2 * half + 1), st.floats(math.pi / 5, math.pi))
@settings(max_examples=20)
def test_sinc_is_its_formula(size: int, cutoff: float) -> None:
    """With Bessel's integral for J1, of which PyTorch's float64 knows eight digits."""
    steps = np.arange(400) * math.pi / 200
    at = np.arange(size) - size // 2
    radius = np.hypot(at[:, None], at)
    j1 = np.cos(steps - cutoff * radius[..., None] * np.sin(steps)).mean(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.where(radius > 0, cutoff * j1 / (2 * math.pi * radius), cutoff**2 / (4 * math.pi))
    np.testing.assert_allclose(
        sinc_kernel(size, cutoff).numpy(), expected / expected.sum(), rtol=0, atol=1e-6
    )


def weights(old: int, new: int, mode: str) -> Array:
    """`(new, old)`: what each new pixel is a sum of; no antialiasing, half-pixel centres, edges repeated."""
    matrix = np.zeros((new, old))
    for i in range(new):
        if mode == "area":
            first, last = i * old // new, -(-(i + 1) * old // new)
            matrix[i, first:last] = 1 / (last - first)
            continue
        place = (i + 0.5) * old / new - 0.5
        if mode == "bilinear":
            place = max(place, 0)
        below = math.floor(place)
        for at in range(below - 1, below + 3):
            d = abs(place - at)
            if mode == "bilinear":
                share = max(0.0, 1 - d)
            elif d <= 1:
                share = 1.25 * d**3 - 2.25 * d**2 + 1
            else:
                share = -0.75 * (d - 1) * max(0.0, 2 - d) ** 2
            matrix[i, min(max(at, 0), old - 1)] += share
    return matrix


@given(
    *(st.integers(1, 40) for _ in range(4)),
    st.sampled_from(["area", "bilinear", "bicubic"]),
)
@settings(max_examples=40)
def test_resize_is_its_formula(height: int, width: int, rows: int, columns: int, mode: str) -> None:
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height))
    expected = weights(height, rows, mode) @ image[0].double().numpy() @ weights(width, columns, mode).T
    found = resize(image, [(height, width)], [(rows, columns)], [mode], (rows, columns))[0]
    # Where a pixel lies is known to a few millionths: float32.
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=0, atol=1e-4)


def coded(plane: Array, table: Array) -> Array:
    """Blocks of 8 x 8 of a plane of levels, coded with a table and back: T.81, annex A.3.3."""
    frequency = np.arange(8)
    scale = np.where(frequency == 0, math.sqrt(0.5), 1) / 2
    cosine = np.cos((2 * np.arange(8)[:, None] + 1) * frequency * math.pi / 16) * scale
    out = np.empty_like(plane)
    for row in range(0, len(plane), 8):
        for column in range(0, plane.shape[1], 8):
            block = plane[row : row + 8, column : column + 8] - 128
            coefficients = np.einsum("yx,yv,xu->vu", block, cosine, cosine)
            kept = np.round(coefficients / table) * table
            out[row : row + 8, column : column + 8] = np.einsum("vu,yv,xu->yx", kept, cosine, cosine) + 128
    return out.round().clip(0, 255)


@given(st.floats(1, 100), st.integers(0, 99))
@settings(max_examples=25)
def test_a_float_quality_scales_the_table(quality: float, seed: int) -> None:
    """A grey photo has no chroma: what is left is luminance, coded with T.81's table K.1 times a factor."""
    grey = np.random.default_rng(seed).integers(0, 256, (32, 48)) * 0.3 + np.arange(48) * 3
    grey = grey.round().clip(0, 255)
    factor = (5000 / quality if quality < 50 else 200 - 2 * quality) / 100
    table = np.array(plain._LUMA, dtype=np.float64).reshape(8, 8) * factor
    expected = coded(grey, np.maximum(table, 2**-10))
    image = torch.from_numpy(grey / 255).float().expand(1, 3, -1, -1)
    found = jpeg(image, quality, float_quality=True)[0].double().numpy() * 255
    # A coefficient or pixel on the edge of a step may fall either way.
    assert np.abs(found - expected).mean() < 0.02
    assert np.abs(found[0] - found[2]).max() < 1e-3


@pytest.mark.parametrize("quality", [25, 50])
def test_a_whole_quality_whose_table_is_whole_is_both(quality: int) -> None:
    image = photo(48)
    assert torch.equal(jpeg(image, quality), jpeg(image, float(quality), float_quality=True))


def with_tables(image: Tensor, quality: float) -> Tensor:
    """By Pillow's libjpeg, with the nearest tables of a file."""
    return plain._jpeg(image, float(quality))


@pytest.mark.parametrize("quality", [31.4, 49.9, 62.7, 80.1])
def test_a_float_quality_has_the_artefacts_of_libjpeg(quality: float) -> None:
    image = photo(96)
    found, expected = jpeg(image, quality, float_quality=True), with_tables(image, quality)
    errors = torch.stack(((found - image).flatten(), (expected - image).flatten()))
    assert torch.corrcoef(errors)[0, 1] > 0.9


def test_the_plain_path_has_libjpegs_tables() -> None:
    """What the tests and benchmarks compare with: a file of Pillow's own quality 50, byte for byte."""
    pixels = (photo(48)[0] * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=50, subsampling="4:2:0")
    with Image.open(file) as decoded:
        expected = torch.from_numpy(np.array(decoded)).permute(2, 0, 1)[None].float() / 255
    assert torch.equal(with_tables(photo(48), 50.0), expected)
    assert torch.equal(plain._jpeg(photo(48), 50), expected)


def test_quality_must_be_whole_unless_it_scales_the_table() -> None:
    with pytest.raises(TypeError, match="quality: expected an integer"):
        jpeg(photo(8), 50.5)
    with pytest.raises(ValueError, match="quality"):
        jpeg(photo(8), 100.5, float_quality=True)
    grey = photo(16)[:, :1].expand(-1, 3, -1, -1)
    assert (jpeg(grey, 100.0, float_quality=True) - grey).abs().max() < 1.1 / 255


def test_unions_of_levels_make_photons() -> None:
    """White is as many photons as there are levels, up to a power of two; those of luma for grey noise."""
    image = torch.tensor([[0.2, 0.4, 0.6]])[..., None, None].expand(1, 3, 50, 50)
    noise = degradation._poisson_noise(image, torch.randn(1, 1, 50, 50), [(50, 50)])
    assert noise.shape == (1, 1, 50, 50)
    luma = round((0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6) * 255) / 255
    assert noise.std().item() == pytest.approx(math.sqrt(luma), rel=0.1)  # one level: one photon of white
    three = degradation._poisson_noise(image, torch.randn(1, 3, 50, 50), [(50, 50)])
    assert three[:, 1].std().item() == pytest.approx(math.sqrt(0.4 / 4), rel=0.1)  # three levels: four


def planned(config: DegradationConfig, count: int, seed: int = 0) -> list[Any]:
    streams = [np.random.default_rng((seed, i, 0)) for i in range(count)]
    return [degradation._plan((128, 128), (32, 32), config, rng) for rng in streams]


@pytest.mark.parametrize("name", ["x4plus", "varsr", "real-esrgan"])
def test_all_stages_together_are_the_plain_ones(name: str) -> None:
    """With whole qualities, which libjpeg can have too."""
    config, hr = replace(PRESETS[name], float_quality=False), photo(128, 12)
    expected = plain.degrade(hr, planned(config, 12), config)
    found, allowed = degrade(hr, 0, config=config), TOLERANCES["degraded_mean"].atol
    assert (found - expected).abs().mean((1, 2, 3)).max() <= allowed
    # That is not because all degradations are alike.
    others = plain.degrade(hr, planned(config, 12, seed=1), config)
    assert (found - others).abs().mean((1, 2, 3)).median() > 2 * allowed


def test_sharpening_shows_in_the_low_resolution_image() -> None:
    hr = photo(128, 8)
    difference = (degrade(hr, 0, config=PRESETS["x4plus"]) - degrade(hr, 0, config=REAL_ESRGAN)) * 255
    assert difference.square().mean().sqrt() > 3
