"""Low-resolution training inputs made from photos: two-order degradation and clean down-sampling.

Source: Wang et al., "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data", 2021.
The defaults are those of its x4plus training configuration.

Each image is degraded alone, with a random stream keyed by (seed, its index): a result never depends on the
rest of the batch. Parameters and noise are drawn on the CPU, so CPU and GPU agree up to rounding.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.checks import check_image, check_integer, check_number
from hitsr_fast.data.blur_kernels import KERNEL_SHAPES, gaussian_kernel, sinc_kernel
from hitsr_fast.data.degradation_config import REAL_ESRGAN_X4PLUS, DegradationConfig, OrderConfig
from hitsr_fast.data.jpeg import jpeg

DEGRADED: Final = 0  # class id of an input made by `degrade`
CLEAN_BILINEAR: Final = 1  # class id of an input made by `clean_pair`

_RESIZE_MODES: Final = ("area", "bilinear", "bicubic")
_DEGRADATION_STREAM, _CLASS_STREAM = 0, 1  # third part of the key of a random stream


def degrade(
    hr: Tensor,
    seed: int,
    *,
    config: DegradationConfig = REAL_ESRGAN_X4PLUS,
    scale: int = 4,
    first_index: int = 0,
) -> Tensor:
    """Degrade photos at random: blur, resize, noise and JPEG, twice over, down to 1/`scale` of the size.

    Args:
        hr: floating point `(B, 3, H, W)`, RGB in [0, 1]; H and W multiples of `scale`. Runs on its device.
        seed: not negative; image `i` uses the stream of (`seed`, `first_index + i`).
        config: strengths and probabilities.
        scale: how much smaller the result is.
        first_index: index of the first image, for a batch that is part of a larger one.

    Returns:
        float32 `(B, 3, H / scale, W / scale)` in [0, 1], on the 8-bit grid, on `hr`'s device.

    Raises:
        TypeError, ValueError: an argument is of another type or shape, or out of range.

    Notes:
        Real-ESRGAN, figure 2. As there, resizing is not antialiased: aliasing is one of the degradations. The
        JPEG is a real one; Poisson noise is a smooth function of normal draws (see `_poisson_noise`).
    """
    _check_images(hr, scale)
    _check_key(seed, first_index)
    height, width = hr.shape[-2] // scale, hr.shape[-1] // scale
    lr = []
    with torch.no_grad():
        for index, image in enumerate(torch.split(hr.float(), 1), start=first_index):
            rng = np.random.default_rng((seed, index, _DEGRADATION_STREAM))
            lr.append(_degrade_one(image, (height, width), config, rng))
    return torch.cat(lr)


def clean_pair(hr: Tensor, scale: int = 4) -> Tensor:
    """Down-sample photos without degradation: antialiased bilinear, the "clean bilinear" class.

    Arguments, result and errors are those of `degrade`.
    """
    _check_images(hr, scale)
    size = (hr.shape[-2] // scale, hr.shape[-1] // scale)
    return _to_8_bit(F.interpolate(hr.float(), size=size, mode="bilinear", antialias=True))


def lr_pair(
    hr: Tensor,
    seed: int,
    *,
    clean_prob: float = 0.25,
    config: DegradationConfig = REAL_ESRGAN_X4PLUS,
    scale: int = 4,
    first_index: int = 0,
) -> tuple[Tensor, Tensor]:
    """Make the low-resolution input and its class for each photo of a batch.

    Args:
        clean_prob: probability of the clean class, from 0 to 1, drawn per image.
        hr, seed, config, scale, first_index: as for `degrade`, as are the errors.

    Returns:
        lr: float32 `(B, 3, H / scale, W / scale)` in [0, 1]; degraded ones equal `degrade`'s.
        class_id: int64 `(B,)` on `hr`'s device, `DEGRADED` (0) or `CLEAN_BILINEAR` (1).
    """
    _check_images(hr, scale)
    _check_key(seed, first_index)
    check_number("clean_prob", clean_prob, 0, 1)
    images, classes = [], []
    for index, image in enumerate(torch.split(hr, 1), start=first_index):
        if np.random.default_rng((seed, index, _CLASS_STREAM)).random() < clean_prob:
            images.append(clean_pair(image, scale))
            classes.append(CLEAN_BILINEAR)
        else:
            images.append(degrade(image, seed, config=config, scale=scale, first_index=index))
            classes.append(DEGRADED)
    return torch.cat(images), torch.tensor(classes, device=hr.device)


def _degrade_one(
    image: Tensor, lr_size: tuple[int, int], config: DegradationConfig, rng: np.random.Generator
) -> Tensor:
    """Degrade one float32 `(1, 3, H, W)` image to `(1, 3, *lr_size)`."""
    image = _blur_resize_noise(image, (image.shape[-2], image.shape[-1]), config.first, config, rng)
    image = jpeg(image, _random_quality(config.first, rng))
    image = _blur_resize_noise(image, lr_size, config.second, config, rng)

    quality = _random_quality(config.second, rng)
    jpeg_last = rng.random() < 0.5
    if not jpeg_last:
        image = jpeg(image, quality)
    image = _resize(image, lr_size, rng)
    if rng.random() < config.final_sinc_prob:
        size = int(rng.choice(config.kernel_sizes))
        image = _blur(image, sinc_kernel(size, rng.uniform(math.pi / 3, math.pi)))
    return jpeg(image, quality) if jpeg_last else _to_8_bit(image)


def _blur_resize_noise(
    image: Tensor,
    base_size: tuple[int, int],
    order: OrderConfig,
    config: DegradationConfig,
    rng: np.random.Generator,
) -> Tensor:
    if rng.random() < order.blur_prob:
        image = _blur(image, _random_kernel(order, config, rng))
    image = _resize(image, _random_size(base_size, order, rng), rng)
    return _add_noise(image, order, rng)


def _random_quality(order: OrderConfig, rng: np.random.Generator) -> int:
    return int(rng.integers(order.jpeg_range[0], order.jpeg_range[1], endpoint=True))


def _random_kernel(order: OrderConfig, config: DegradationConfig, rng: np.random.Generator) -> Tensor:
    size = int(rng.choice(config.kernel_sizes))
    if rng.random() < order.sinc_prob:
        # A small kernel cannot hold the slow ringing of a low cutoff.
        return sinc_kernel(size, rng.uniform(math.pi / 3 if size < 13 else math.pi / 5, math.pi))
    shape = KERNEL_SHAPES[int(rng.choice(len(KERNEL_SHAPES), p=config.kernel_probs))]
    sigma_x = sigma_y = rng.uniform(*order.sigma_range)
    angle = 0.0
    if shape.endswith("aniso"):
        sigma_y = rng.uniform(*order.sigma_range)
        angle = rng.uniform(-math.pi, math.pi)
    limits = {"generalized": config.generalized_beta_range, "plateau": config.plateau_beta_range}
    for profile, (low, high) in limits.items():
        if shape.startswith(profile):
            # Half of the draws below 1 (heavy tails), half above (flat tops).
            beta = rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high)
            return gaussian_kernel(size, sigma_x, sigma_y, angle, profile=profile, beta=beta)
    return gaussian_kernel(size, sigma_x, sigma_y, angle)


def _random_size(base: tuple[int, int], order: OrderConfig, rng: np.random.Generator) -> tuple[int, int]:
    kind = int(rng.choice(3, p=order.resize_probs))
    low, high = ((1.0, order.resize_range[1]), (order.resize_range[0], 1.0), (1.0, 1.0))[kind]
    factor = rng.uniform(low, high)
    return max(1, int(base[0] * factor)), max(1, int(base[1] * factor))


def _resize(image: Tensor, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    mode = _RESIZE_MODES[int(rng.integers(len(_RESIZE_MODES)))]
    if size == tuple(image.shape[-2:]):
        return image
    return F.interpolate(image, size=size, mode=mode)


def _blur(image: Tensor, kernel: Tensor) -> Tensor:
    """Convolve each channel of `(1, C, H, W)` with an odd square kernel, mirrored at the borders.

    By FFT: a 21 x 21 kernel costs no more than a small one, on either device.
    """
    height, width = image.shape[-2:]
    radius = kernel.shape[0] // 2
    rows, columns = _mirror(height, radius, image.device), _mirror(width, radius, image.device)
    padded = image[:, :, rows[:, None], columns]
    size = (_fft_length(height + 2 * radius), _fft_length(width + 2 * radius))
    spectrum = torch.fft.rfft2(padded, s=size) * torch.fft.rfft2(kernel.to(image), s=size)
    full: Tensor = torch.fft.irfft2(spectrum, s=size)
    return full[..., 2 * radius : 2 * radius + height, 2 * radius : 2 * radius + width]


def _mirror(length: int, radius: int, device: torch.device) -> Tensor:
    """Indices -radius .. length + radius - 1 reflected into the image; unlike `F.pad`, for any radius."""
    period = max(1, 2 * (length - 1))
    index = torch.arange(-radius, length + radius, device=device) % period
    return torch.minimum(index, period - index)


def _fft_length(length: int) -> int:
    """Next multiple of 16: avoids the slow large prime sizes."""
    return -(-length // 16) * 16


def _add_noise(image: Tensor, order: OrderConfig, rng: np.random.Generator) -> Tensor:
    gaussian = rng.random() < order.gaussian_noise_prob
    gray = rng.random() < order.gray_noise_prob
    strength = rng.uniform(*(order.gaussian_noise_range if gaussian else order.poisson_scale_range))
    channels = 1 if gray else 3
    draws = rng.standard_normal((1, channels, *image.shape[-2:]), dtype=np.float32)
    normal = torch.from_numpy(draws).to(image.device)
    noise = normal * (strength / 255) if gaussian else _poisson_noise(image, normal) * strength
    return (image + noise).clamp_(0, 1)


def _poisson_noise(image: Tensor, normal: Tensor) -> Tensor:
    """Photon noise of `image` `(1, 3, H, W)`, or of its luma, from normal draws `(1, 3 or 1, H, W)`.

    A Poisson count of mean m is taken as its second-order Cornish-Fisher quantile m + √m z + (z² - 1)/6, cut
    at zero: mean and skewness right, variance m + 1/18. Being smooth in m it gives CPU and GPU the same
    noise, where rejection sampling would let one rounding difference change every later pixel.
    """
    if normal.shape[1] == 1:
        image = (image * image.new_tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)).sum(1, keepdim=True)
    levels = (image * 255).round_().clamp_(0, 255)
    present = image.new_zeros(256)
    present[levels.long().flatten()] = 1
    photons = 2 ** present.sum().log2().ceil()  # of a white pixel: the levels in use, up to a power of two
    mean = levels / 255 * photons
    count = (mean + mean.sqrt() * normal + (normal**2 - 1) / 6).clamp_(min=0)
    return torch.where(mean > 0, count - mean, 0.0) / photons


def _to_8_bit(image: Tensor) -> Tensor:
    return (image * 255).round_().clamp_(0, 255).div_(255)


def _check_images(hr: Tensor, scale: int) -> None:
    check_image("hr", hr)
    check_integer("scale", scale, 1)
    if 0 in hr.shape or hr.shape[-2] % scale or hr.shape[-1] % scale:
        raise ValueError(f"hr: expected B > 0 and sides divisible by {scale}, found {tuple(hr.shape)}")


def _check_key(seed: int, first_index: int) -> None:
    check_integer("seed", seed, 0)
    check_integer("first_index", first_index, 0)
