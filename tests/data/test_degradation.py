"""The degradation: deterministic, per image, in range, with the statistics its configuration says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.data import degradation
from hitsr_fast.data.blur_kernels import gaussian_kernel
from hitsr_fast.data.degradation import CLEAN_BILINEAR, DEGRADED, clean_pair, degrade, lr_pair
from hitsr_fast.data.degradation_config import (
    PRESETS,
    REAL_ESRGAN,
    VARSR,
    X4PLUS,
    DegradationConfig,
    OrderConfig,
)
from hitsr_fast.data.ragged import blur
from hitsr_fast.data.sharpen import unsharp_mask
from tests.tolerances import TOLERANCES


def photos(count: int, height: int = 48, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, 3, height // 8, width // 8, generator=generator)
    return torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear")


def on_8_bit_grid(image: Tensor) -> bool:
    return torch.equal((image * 255).round() / 255, image)


# Three images of 4 x 4, uint8, as `degrade(photos(3, 16, 16), 5)` made them when images were done one by one.
MADE_BEFORE = (
    "6c5e7ba975515176453333460e22353a5f5780b87e606d9b7b6f7b985f7999a7685873a07d59577a6955536540536568"
    "1b322a33324241474247535542385854b4c9bdc2a4b3adaf6669726f3427433bb9d3d4e5b7ccd3e2979fb4be79729a9f"
    "91835744a29366509b8a5940927e492b173663783e5c8a9e6180adc36987b5cb2c373c383c464b46313a3d391922241d"
)


def in_one_canvas(hr: Tensor, seed: int, config: DegradationConfig = REAL_ESRGAN) -> Tensor:
    """`degrade` as a GPU does it."""
    size = (hr.shape[-2], hr.shape[-1])
    streams = [np.random.default_rng((seed, i, 0)) for i in range(len(hr))]
    plans = [degradation._plan(size, (size[0] // 4, size[1] // 4), config, rng) for rng in streams]
    return degradation._carry_out(degradation._sharp(hr, config), plans, config)


@pytest.mark.parametrize("way", [degrade, in_one_canvas])
def test_the_images_of_a_seed_stay(way: Callable[[Tensor, int], Tensor]) -> None:
    before = torch.frombuffer(bytearray.fromhex(MADE_BEFORE), dtype=torch.uint8).view(3, 3, 4, 4) / 255
    difference = (way(photos(3, 16, 16), 5) - before).abs().mean((1, 2, 3))
    assert (difference <= TOLERANCES["jpeg_mean"].atol).all()


@pytest.mark.parametrize("config", [REAL_ESRGAN, X4PLUS, VARSR])
def test_a_batch_in_one_canvas_is_its_images(config: DegradationConfig) -> None:
    hr = photos(12, 64, 48)
    for seed in range(3):
        one_by_one = degrade(hr, seed, config=config)
        difference = (in_one_canvas(hr, seed, config) - one_by_one).abs().mean((1, 2, 3))
        assert (difference <= TOLERANCES["jpeg_mean"].atol).all()


@pytest.mark.parametrize("config", [REAL_ESRGAN, X4PLUS, VARSR])
def test_shape_range_and_determinism(config: DegradationConfig) -> None:
    hr = photos(6)
    lr = degrade(hr, 5, config=config)
    assert lr.shape == (6, 3, 12, 16)
    assert lr.dtype == torch.float32
    assert lr.min() >= 0
    assert lr.max() <= 1
    assert on_8_bit_grid(lr)
    assert torch.equal(lr, degrade(hr, 5, config=config))
    assert not torch.equal(lr, degrade(hr, 6, config=config))


@given(st.integers(0, 2**40), st.integers(0, 4))
@settings(max_examples=10)
def test_an_image_does_not_depend_on_its_batch(seed: int, index: int) -> None:
    hr = photos(5, 32, 32)
    batch, classes = lr_pair(hr, seed)
    alone, class_alone = lr_pair(hr[index : index + 1], seed, first_index=index)
    assert torch.equal(batch[index : index + 1], alone)
    assert torch.equal(classes[index : index + 1], class_alone)


def test_equal_images_of_a_batch_get_different_treatment() -> None:
    lr = degrade(photos(1).expand(4, -1, -1, -1), 0)
    assert all(not torch.equal(lr[0], lr[i]) for i in range(1, 4))


def test_global_random_state_is_neither_used_nor_moved() -> None:
    hr = photos(2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = degrade(hr, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(degrade(hr, 3), first)


def test_input_is_left_alone() -> None:
    hr = photos(3)
    before = hr.clone()
    lr_pair(hr, 0)
    assert torch.equal(hr, before)


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 2, 4]))
@settings(max_examples=15)
def test_any_size(rows: int, columns: int, scale: int) -> None:
    lr = degrade(photos(1, 96, 96)[..., : rows * scale, : columns * scale], 1, scale=scale)
    assert lr.shape == (1, 3, rows, columns)
    assert lr.isfinite().all()


def test_resembles_the_photo_but_is_worse_than_clean() -> None:
    hr = photos(24, 64, 64)
    clean = clean_pair(hr)
    for config, least in ((REAL_ESRGAN, 0.6), (X4PLUS, 0.6), (VARSR, 0.8)):
        degraded = degrade(hr, 0, config=config)
        assert (degraded - clean).square().mean() > 1e-4
        correlation = torch.corrcoef(torch.stack((degraded.flatten(), clean.flatten())))[0, 1]
        assert least < correlation < 0.99


def test_presets_differ_by_what_their_names_say() -> None:
    files = {"float_quality": False, "usm_weight": 0.0}
    assert replace(PRESETS["x4plus"], **files) == PRESETS["real-esrgan"] == DegradationConfig()
    assert (X4PLUS.usm_weight, X4PLUS.usm_radius, X4PLUS.usm_threshold) == (0.5, 50, 10)
    assert VARSR.usm_weight == 0


def test_what_is_degraded_is_the_sharpened_photo() -> None:
    hr, sharpening = photos(6, 64, 64), replace(REAL_ESRGAN, usm_weight=0.5)
    sharp = degrade(hr, 3, config=sharpening)
    assert torch.equal(sharp, degrade(unsharp_mask(hr), 3))
    assert not torch.equal(sharp, degrade(hr, 3))


def test_clean_pairs_are_not_sharpened() -> None:
    hr = photos(2)
    lr, _ = lr_pair(hr, 0, clean_prob=1, config=X4PLUS)
    assert torch.equal(lr, clean_pair(hr))


def test_clean_pair_is_the_antialiased_mean() -> None:
    hr = photos(2)
    clean = clean_pair(hr)
    assert on_8_bit_grid(clean)
    assert (clean - torch.nn.functional.avg_pool2d(hr, 4)).abs().max() < 0.05
    checkerboard = (torch.arange(32)[:, None] + torch.arange(32)).remainder(2).float().expand(1, 3, 32, 32)
    assert (clean_pair(checkerboard) - 0.5).abs().max() < 0.02  # no aliasing


def test_class_share_and_images() -> None:
    hr = photos(1, 8, 8).expand(2000, -1, -1, -1)
    cheap = DegradationConfig(kernel_sizes=(7,))
    lr, class_id = lr_pair(hr[:60], 11, config=cheap)
    assert torch.equal(lr[class_id == CLEAN_BILINEAR], clean_pair(hr[:60])[class_id == CLEAN_BILINEAR])
    assert torch.equal(lr[class_id == DEGRADED], degrade(hr[:60], 11, config=cheap)[class_id == DEGRADED])
    assert set(class_id.tolist()) == {DEGRADED, CLEAN_BILINEAR}
    assert class_id.dtype == torch.int64
    assert lr_pair(hr[:4], 0, clean_prob=1.0)[1].eq(CLEAN_BILINEAR).all()
    assert lr_pair(hr[:4], 0, clean_prob=0.0)[1].eq(DEGRADED).all()


def test_class_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(degradation, "_degrade", lambda hr, keys, config, scale: clean_pair(hr, scale))
    _, class_id = lr_pair(torch.zeros(2000, 3, 4, 4), 0, clean_prob=0.25)
    share = (class_id == CLEAN_BILINEAR).float().mean().item()
    assert abs(share - 0.25) <= TOLERANCES["share_of_2000"].atol


class Draws:
    """What the degradation draws, written down as it draws it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.profiles: list[tuple[str, bool]] = []
        self.sigmas: list[float] = []
        self.betas: list[float] = []

        def spy_gaussian(
            size: int,
            sigma_x: float,
            sigma_y: float,
            angle: float,
            *,
            profile: str = "gaussian",
            beta: float = 1,
        ) -> Tensor:
            self.profiles.append((profile, sigma_x == sigma_y))
            self.sigmas += [sigma_x, sigma_y]
            if profile == "generalized":
                self.betas.append(beta)
            return torch.ones(1, 1)

        def spy_sinc(size: int, cutoff: float) -> Tensor:
            self.profiles.append(("sinc", True))
            return torch.ones(1, 1)

        monkeypatch.setattr(degradation, "gaussian_kernel", spy_gaussian)
        monkeypatch.setattr(degradation, "sinc_kernel", spy_sinc)


def test_kernel_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = Draws(monkeypatch)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        degradation._random_kernel(REAL_ESRGAN.first, REAL_ESRGAN, rng)
    expected = {
        ("sinc", True): 0.1,
        ("gaussian", True): 0.9 * 0.45,
        ("gaussian", False): 0.9 * 0.25,
        ("generalized", True): 0.9 * 0.12,
        ("generalized", False): 0.9 * 0.03,
        ("plateau", True): 0.9 * 0.12,
        ("plateau", False): 0.9 * 0.03,
    }
    for kind, share in expected.items():
        assert abs(draws.profiles.count(kind) / 2000 - share) <= TOLERANCES["share_of_2000"].atol, kind
    assert 0.2 <= min(draws.sigmas) < 0.3
    assert 2.9 < max(draws.sigmas) <= 3.0
    assert 0.5 <= min(draws.betas) < max(draws.betas) <= 4.0
    assert 0.35 < np.mean(np.array(draws.betas) < 1) < 0.65


def test_resize_and_quality_statistics() -> None:
    rng = np.random.default_rng(0)
    order = REAL_ESRGAN.first
    heights = np.array([degradation._random_size((1000, 500), order, rng)[0] for _ in range(2000)])
    tolerance = TOLERANCES["share_of_2000"].atol
    assert abs(np.mean(heights > 1000) - 0.2) <= tolerance
    assert abs(np.mean(heights < 1000) - 0.7) <= tolerance
    assert abs(np.mean(heights == 1000) - 0.1) <= tolerance
    assert 150 <= heights.min() < 170
    assert 1470 < heights.max() <= 1500
    qualities = np.array([degradation._random_quality(order, REAL_ESRGAN, rng) for _ in range(2000)])
    assert (qualities.min(), qualities.max()) == (30, 95)
    assert (qualities == qualities.round()).all()
    qualities = np.array([degradation._random_quality(order, X4PLUS, rng) for _ in range(2000)])
    assert 30 <= qualities.min() < 30.5 and 94.5 < qualities.max() < 95
    assert (qualities != qualities.round()).all()
    assert abs(np.mean(qualities < 46.25) - 0.25) <= tolerance


def noise_of(order: OrderConfig, level: float, repeats: int = 4) -> Tensor:
    """Noise that is added to a flat grey image, in 8-bit levels: `(repeats, 3, 100, 100)`."""
    grey = torch.full((1, 3, 100, 100), level)
    rng = np.random.default_rng(0)
    noises = [degradation._random_noise((100, 100), order, rng) for _ in range(repeats)]
    return torch.cat([degradation._add_noise(grey, [(100, 100)], [noise]) - grey for noise in noises]) * 255


def test_gaussian_noise() -> None:
    order = OrderConfig(gaussian_noise_prob=1, gaussian_noise_range=(10, 10), gray_noise_prob=0)
    noise = noise_of(order, 0.5)
    torch.testing.assert_close(noise.std().item(), 10.0, **TOLERANCES["noise_moments"]._asdict())
    assert abs(noise.mean()) < 0.2
    channels = torch.corrcoef(noise.transpose(0, 1).flatten(1))
    assert (channels - torch.eye(3)).abs().max() < 0.05


@pytest.mark.parametrize("gaussian_prob", [0.0, 1.0])
def test_gray_noise_is_the_same_in_all_channels(gaussian_prob: float) -> None:
    noise = noise_of(OrderConfig(gaussian_noise_prob=gaussian_prob, gray_noise_prob=1), 0.5)
    torch.testing.assert_close(noise[:, 0], noise[:, 2], rtol=0, atol=1e-4)
    assert noise.std() > 0


@pytest.mark.parametrize("mean", [1, 4, 30, 200])
def test_poisson_noise_has_poisson_moments(mean: int) -> None:
    """Against NumPy's Poisson counts; a gradient makes all 256 levels present, so white is 256 photons."""
    level = round(mean / 256 * 255) / 255
    image = torch.full((1, 3, 200, 200), level)
    image[:, :, :1] = (torch.arange(200) / 255).round(decimals=6)
    noise = degradation._poisson_noise(image, torch.randn(1, 3, 200, 200), [(200, 200)])[:, :, 1:] * 256
    count = noise + level * 256
    counts = np.random.default_rng(0).poisson(level * 256, 10**5)
    tolerance = TOLERANCES["noise_moments"]._asdict()
    torch.testing.assert_close(count.mean().item(), float(counts.mean()), **tolerance)
    torch.testing.assert_close(count.std().item(), float(counts.std()), **tolerance)
    skewness = ((count - count.mean()) / count.std()).pow(3).mean().item()
    assert abs(skewness - mean**-0.5) < 0.2 * mean**-0.5 + 0.03
    assert count.min() >= 0


def test_poisson_noise_leaves_black_alone() -> None:
    noise = degradation._poisson_noise(torch.zeros(1, 3, 8, 8), torch.randn(1, 3, 8, 8), [(8, 8)])
    assert not noise.any()


@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([1, 7, 21]))
def test_blur_is_a_mirrored_convolution(height: int, width: int, size: int) -> None:
    image = torch.rand(1, 3, height, width, dtype=torch.float64)
    kernel = gaussian_kernel(size, 2.0, 1.0, 0.5)
    padded = np.pad(image[0].numpy(), ((0, 0), (size // 2,) * 2, (size // 2,) * 2), mode="reflect")
    expected = torch.nn.functional.conv2d(torch.from_numpy(padded)[:, None], kernel[None, None]).transpose(
        0, 1
    )
    actual = blur(image, [(height, width)], [kernel])
    torch.testing.assert_close(actual, expected, **TOLERANCES["float64_reordered"]._asdict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_gpu_agree() -> None:
    hr = photos(8, 128, 128)
    on_cpu, cpu_class = lr_pair(hr, 4)
    on_gpu, gpu_class = lr_pair(hr.cuda(), 4)
    assert torch.equal(cpu_class, gpu_class.cpu())
    # A JPEG coefficient on the edge of a step may fall either way; the images stay alike.
    assert (on_cpu - on_gpu.cpu()).abs().mean() <= TOLERANCES["jpeg_mean"].atol


def test_bad_arguments() -> None:
    hr = photos(1)
    with pytest.raises(TypeError, match="hr"):
        degrade(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 0)
    with pytest.raises(ValueError, match="hr"):
        degrade(hr[0], 0)
    with pytest.raises(ValueError, match="hr"):
        degrade(hr[..., :-1], 0)
    with pytest.raises(ValueError, match="scale"):
        clean_pair(hr, 0)
    with pytest.raises(ValueError, match="seed"):
        degrade(hr, -1)
    with pytest.raises(ValueError, match="first_index"):
        degrade(hr, 0, first_index=-1)
    with pytest.raises(ValueError, match="clean_prob"):
        lr_pair(hr, 0, clean_prob=1.5)


def test_bad_configurations() -> None:
    with pytest.raises(ValueError, match="blur_prob"):
        OrderConfig(blur_prob=2)
    with pytest.raises(ValueError, match="resize_probs"):
        OrderConfig(resize_probs=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="sigma_range"):
        OrderConfig(sigma_range=(3, 1))
    with pytest.raises(ValueError, match="resize_range"):
        OrderConfig(resize_range=(1.1, 1.5))
    with pytest.raises(ValueError, match="jpeg_range"):
        OrderConfig(jpeg_range=(30, 101))
    with pytest.raises(ValueError, match="jpeg_range"):
        OrderConfig(jpeg_range=(0.5, 95))
    with pytest.raises(ValueError, match=r"second.jpeg_range: expected whole numbers"):
        DegradationConfig(second=OrderConfig(jpeg_range=(30.5, 95)))
    assert DegradationConfig(second=OrderConfig(jpeg_range=(30.5, 95)), float_quality=True)
    with pytest.raises(ValueError, match="usm_weight"):
        DegradationConfig(usm_weight=-0.5)
    with pytest.raises(ValueError, match="usm_radius"):
        DegradationConfig(usm_radius=0)
    with pytest.raises(ValueError, match="kernel_probs"):
        DegradationConfig(kernel_probs=(1.0,))
    with pytest.raises(ValueError, match="kernel_sizes"):
        replace(REAL_ESRGAN, kernel_sizes=(8,))
    with pytest.raises(ValueError, match="plateau_beta_range"):
        replace(REAL_ESRGAN, plateau_beta_range=(1.5, 2))
