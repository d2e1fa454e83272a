"""Low-resolution training inputs made from photos: two-order degradation and clean down-sampling.

Source: Wang et al., "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data", 2021.
Configurations are in `hitsr_fast.data.degradation_config`.

Each image has a random stream keyed by (seed, its index): a result never depends on the rest of the batch.
Parameters and noise are drawn on the CPU, so CPU and GPU agree up to rounding, and nothing is read back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.checks import check_image, check_integer, check_number
from hitsr_fast.data.blur_kernels import gaussian_kernel, sinc_kernel
from hitsr_fast.data.degradation_config import KERNEL_SHAPES, REAL_ESRGAN, DegradationConfig, OrderConfig
from hitsr_fast.data.jpeg import jpeg_of_sizes
from hitsr_fast.data.ragged import RESIZE_MODES, Size, blur, inside, no_autocast, on, resize
from hitsr_fast.data.sharpen import unsharp_mask
from hitsr_fast.transfer import to_device

DEGRADED: Final = 0  # class id of an input made by `degrade`
CLEAN_BILINEAR: Final = 1  # class id of an input made by `clean_pair`

_DEGRADATION_STREAM, _CLASS_STREAM = 0, 1  # third part of the key of a random stream


def degrade(
    hr: Tensor,
    seed: int,
    *,
    config: DegradationConfig = REAL_ESRGAN,
    scale: int = 4,
    first_index: int = 0,
) -> Tensor:
    """Degrade photos at random: blur, resize, noise and JPEG, twice over, down to 1/`scale` of the size.

    With a `usm_weight` what is degraded is the sharpened photo (see `hitsr_fast.data.sharpen`).

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
    return _degrade(hr, [(seed, index) for index in range(first_index, first_index + len(hr))], config, scale)


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
    config: DegradationConfig = REAL_ESRGAN,
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
    keys = [(seed, index) for index in range(first_index, first_index + len(hr))]
    return lr_pairs_of(hr, keys, clean_prob=clean_prob, config=config, scale=scale)


def lr_pairs_of(
    hr: Tensor,
    keys: Sequence[tuple[int, ...]],
    *,
    clean_prob: float = 0.25,
    config: DegradationConfig = REAL_ESRGAN,
    scale: int = 4,
) -> tuple[Tensor, Tensor]:
    """`lr_pair` with a key of its own for each image's random streams."""
    _check_images(hr, scale)
    check_number("clean_prob", clean_prob, 0, 1)
    if len(keys) != len(hr):
        raise ValueError(f"keys: expected one for each of the {len(hr)} images, found {len(keys)}")
    clean = [np.random.default_rng((*key, _CLASS_STREAM)).random() < clean_prob for key in keys]
    height, width = hr.shape[-2] // scale, hr.shape[-1] // scale
    lr = hr.new_empty(len(hr), hr.shape[1], height, width, dtype=torch.float32)
    for is_clean in sorted(set(clean)):
        chosen = [i for i, its in enumerate(clean) if its == is_clean]
        index = to_device(torch.tensor(chosen), hr.device)
        part, part_keys = hr.index_select(0, index), [keys[i] for i in chosen]
        made = clean_pair(part, scale) if is_clean else _degrade(part, part_keys, config, scale)
        lr.index_copy_(0, index, made)
    classes = torch.tensor([CLEAN_BILINEAR if is_clean else DEGRADED for is_clean in clean])
    return lr, to_device(classes, hr.device)


def _degrade(hr: Tensor, keys: Sequence[tuple[int, ...]], config: DegradationConfig, scale: int) -> Tensor:
    """`degrade` with a key for each image's random stream.

    On a CPU image after image: the canvas that holds images of all sizes has more than twice their pixels.
    """
    size = (hr.shape[-2], hr.shape[-1])
    streams = (np.random.default_rng((*key, _DEGRADATION_STREAM)) for key in keys)
    plans = (_plan(size, (size[0] // scale, size[1] // scale), config, rng) for rng in streams)
    with torch.no_grad(), no_autocast(hr.device):
        if hr.device.type == "cpu":
            images = torch.split(hr.float(), 1)
            pairs = zip(images, plans, strict=True)
            return torch.cat([_carry_out(_sharp(image, config), [plan], config) for image, plan in pairs])
        return _carry_out(_sharp(hr.float(), config), list(plans), config)


def _sharp(images: Tensor, config: DegradationConfig) -> Tensor:
    if config.usm_weight == 0:
        return images
    return unsharp_mask(images, config.usm_weight, config.usm_radius, config.usm_threshold)


class _Noise(NamedTuple):
    gaussian: bool  # else Poisson
    strength: float
    normal: npt.NDArray[np.float32]  # (1, H, W) for the same noise in all channels, or (3, H, W)


class _Order(NamedTuple):
    kernel: Tensor | None
    size: Size
    mode: str
    noise: _Noise


class _Plan(NamedTuple):
    """All that is random in the degradation of an image."""

    first: _Order
    first_quality: float
    second: _Order
    second_quality: float
    jpeg_last: bool
    lr_size: Size
    lr_mode: str
    sinc: Tensor | None


def _plan(hr_size: Size, lr_size: Size, config: DegradationConfig, rng: np.random.Generator) -> _Plan:
    # In the order of the operations, which the images of a seed depend on.
    first = _random_order(hr_size, config.first, config, rng)
    first_quality = _random_quality(config.first, config, rng)
    second = _random_order(lr_size, config.second, config, rng)
    second_quality = _random_quality(config.second, config, rng)
    jpeg_last = bool(rng.random() < 0.5)
    lr_mode = _random_mode(rng)
    sinc = None
    if rng.random() < config.final_sinc_prob:
        size = int(rng.choice(config.kernel_sizes))
        sinc = sinc_kernel(size, rng.uniform(math.pi / 3, math.pi))
    return _Plan(first, first_quality, second, second_quality, jpeg_last, lr_size, lr_mode, sinc)


def _carry_out(images: Tensor, plans: Sequence[_Plan], config: DegradationConfig) -> Tensor:
    """Degrade float32 `(B, 3, H, W)` as planned for each image."""
    jpeg = partial(jpeg_of_sizes, float_quality=config.float_quality)
    sizes: list[Size] = [(images.shape[-2], images.shape[-1])] * len(plans)
    images, sizes = _blur_resize_noise(images, sizes, [plan.first for plan in plans])
    images = jpeg(images, sizes, [plan.first_quality for plan in plans])
    images, sizes = _blur_resize_noise(images, sizes, [plan.second for plan in plans])

    def second_jpeg(images: Tensor, sizes: Sequence[Size], last: bool) -> Tensor:
        chosen = [i for i, plan in enumerate(plans) if plan.jpeg_last == last]
        of, qualities = [sizes[i] for i in chosen], [plans[i].second_quality for i in chosen]
        return on(images, chosen, lambda part: jpeg(part, of, qualities))

    images = second_jpeg(images, sizes, last=False)
    lr_sizes = [plan.lr_size for plan in plans]
    images = resize(images, sizes, lr_sizes, [plan.lr_mode for plan in plans], lr_sizes[0])
    images = _blur(images, lr_sizes, [plan.sinc for plan in plans])
    return _to_8_bit(second_jpeg(images, lr_sizes, last=True))  # which leaves those of a JPEG as they are


def _blur_resize_noise(
    images: Tensor, sizes: list[Size], orders: Sequence[_Order]
) -> tuple[Tensor, list[Size]]:
    images = _blur(images, sizes, [order.kernel for order in orders])
    new_sizes = [order.size for order in orders]
    shape = (max(height for height, _ in new_sizes), max(width for _, width in new_sizes))
    images = resize(images, sizes, new_sizes, [order.mode for order in orders], shape)
    return _add_noise(images, new_sizes, [order.noise for order in orders]), new_sizes


def _blur(images: Tensor, sizes: Sequence[Size], kernels: Sequence[Tensor | None]) -> Tensor:
    known = {i: kernel for i, kernel in enumerate(kernels) if kernel is not None}
    of = [sizes[i] for i in known]
    return on(images, list(known), lambda part: blur(part, of, list(known.values())))


def _random_order(
    base_size: Size, order: OrderConfig, config: DegradationConfig, rng: np.random.Generator
) -> _Order:
    kernel = _random_kernel(order, config, rng) if rng.random() < order.blur_prob else None
    size = _random_size(base_size, order, rng)
    return _Order(kernel, size, _random_mode(rng), _random_noise(size, order, rng))


def _random_mode(rng: np.random.Generator) -> str:
    return RESIZE_MODES[int(rng.integers(len(RESIZE_MODES)))]


def _random_quality(order: OrderConfig, config: DegradationConfig, rng: np.random.Generator) -> float:
    low, high = order.jpeg_range
    if config.float_quality:
        return rng.uniform(low, high)
    return int(rng.integers(int(low), int(high), endpoint=True))


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


def _random_noise(size: Size, order: OrderConfig, rng: np.random.Generator) -> _Noise:
    gaussian = bool(rng.random() < order.gaussian_noise_prob)
    gray = rng.random() < order.gray_noise_prob
    strength = rng.uniform(*(order.gaussian_noise_range if gaussian else order.poisson_scale_range))
    return _Noise(gaussian, strength, rng.standard_normal((1 if gray else 3, *size), dtype=np.float32))


def _add_noise(images: Tensor, sizes: Sequence[Size], noises: Sequence[_Noise]) -> Tensor:
    for kind in sorted({(noise.gaussian, len(noise.normal)) for noise in noises}):
        chosen = [i for i, noise in enumerate(noises) if (noise.gaussian, len(noise.normal)) == kind]
        of, some = [sizes[i] for i in chosen], [noises[i] for i in chosen]
        images = on(images, chosen, partial(_noisy, sizes=of, noises=some))
    return images


def _noisy(images: Tensor, sizes: Sequence[Size], noises: Sequence[_Noise]) -> Tensor:
    """Images with noise of one kind."""
    draws = np.zeros((len(noises), len(noises[0].normal), *images.shape[-2:]), np.float32)
    for i, noise in enumerate(noises):
        draws[i, :, : noise.normal.shape[1], : noise.normal.shape[2]] = noise.normal
    normal = to_device(torch.from_numpy(draws), images.device)
    unit = 255.0 if noises[0].gaussian else 1.0
    strength = torch.tensor([noise.strength / unit for noise in noises])[:, None, None, None]
    added = normal if noises[0].gaussian else _poisson_noise(images, normal, sizes)
    return (images + added * to_device(strength, images.device)).clamp_(0, 1)


def _poisson_noise(images: Tensor, normal: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Photon noise of `(B, 3, H, W)`, or of its luma, from normal draws `(B, 3 or 1, H, W)`.

    A Poisson count of mean m is taken as its second-order Cornish-Fisher quantile m + √m z + (z² - 1)/6, cut
    at zero: mean and skewness right, variance m + 1/18. Being smooth in m it gives CPU and GPU the same
    noise, where rejection sampling would let one rounding difference change every later pixel.
    """
    if normal.shape[1] == 1:
        luma = torch.tensor((0.299, 0.587, 0.114), dtype=images.dtype).view(1, 3, 1, 1)
        images = (images * to_device(luma, images.device)).sum(1, keepdim=True)
    levels = (images * 255).round_().clamp_(0, 255)
    level, within = levels.long(), inside(sizes, (images.shape[-2], images.shape[-1]), images.device)
    if within is not None:
        level = torch.where(within, level, 256)
    present = images.new_zeros(len(images), 257).scatter_(1, level.flatten(1), 1.0)[:, :256]
    # Photons of a white pixel: the levels in use, up to a power of two.
    photons = (2 ** present.sum(1).log2().ceil())[:, None, None, None]
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
