"""The two-order degradation image after image, in plain PyTorch and Pillow: what a data set's worker does.

All that is random is given, so that a result can be compared with that of `hitsr_fast.data.degradation`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hitsr_fast.data.degradation_config import DegradationConfig

_LUMA = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    *(17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99),
    *(24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99),
    *(99,) * 32,
)


def degrade(hr: Tensor, plans: Sequence[Any], config: DegradationConfig) -> Tensor:
    """`hitsr_fast.data.degradation.degrade` of float32 `(B, 3, H, W)` as planned, by other means.

    Qualities that are no whole numbers get the nearest tables that a file can have.
    """
    return torch.cat(list(_degraded(hr, plans, config)))


def _degraded(hr: Tensor, plans: Sequence[Any], config: DegradationConfig) -> Iterator[Tensor]:
    for image, plan in zip(hr.split(1), plans, strict=True):
        if config.usm_weight:
            image = unsharp_mask(image, config)
        image = _jpeg(_order(image, plan.first), plan.first_quality)
        image = _order(image, plan.second)
        if not plan.jpeg_last:
            image = _jpeg(image, plan.second_quality)
        image = _resize(image, plan.lr_size, plan.lr_mode)
        if plan.sinc is not None:
            image = _blur(image, plan.sinc)
        if plan.jpeg_last:
            image = _jpeg(image, plan.second_quality)
        yield (image * 255).round().clamp(0, 255) / 255


def unsharp_mask(image: Tensor, config: DegradationConfig) -> Tensor:
    """By two lines of convolutions."""
    side = config.usm_radius // 2 * 2 + 1
    sigma = 0.3 * ((side - 1) * 0.5 - 1) + 0.8
    taps = torch.exp(-((torch.arange(side) - side // 2) ** 2) / (2 * sigma**2))
    taps /= taps.sum()

    def smooth(image: Tensor) -> Tensor:
        rows = F.pad(image.transpose(0, 1), (side // 2,) * 4, mode="reflect")
        return F.conv2d(F.conv2d(rows, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1)).transpose(0, 1)

    residual = image - smooth(image)
    mask = smooth((residual.abs() * 255 > config.usm_threshold).float())
    return mask * (image + config.usm_weight * residual).clamp(0, 1) + (1 - mask) * image


def _order(image: Tensor, order: Any) -> Tensor:
    if order.kernel is not None:
        image = _blur(image, order.kernel)
    image, noise = _resize(image, order.size, order.mode), order.noise
    normal = torch.from_numpy(noise.normal)[None]
    if noise.gaussian:
        return (image + noise.strength / 255 * normal).clamp(0, 1)
    light = image if normal.shape[1] == 3 else image.mul(_GRAY).sum(1, keepdim=True)
    light = (light * 255).round().clamp(0, 255) / 255
    photons = 2 ** torch.tensor(float(len(light.unique()))).log2().ceil()
    mean = light * photons
    count = (mean + mean.sqrt() * normal + (normal**2 - 1) / 6).clamp(min=0)
    return (image + noise.strength * torch.where(mean > 0, count / photons - light, 0)).clamp(0, 1)


_GRAY = torch.tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)


def _blur(image: Tensor, kernel: Tensor) -> Tensor:
    padded = F.pad(image.transpose(0, 1), (len(kernel) // 2,) * 4, mode="reflect")
    return F.conv2d(padded, kernel[None, None].to(image.dtype)).transpose(0, 1)


def _resize(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    return F.interpolate(image, size=size, mode=mode)


def _jpeg(image: Tensor, quality: float) -> Tensor:
    pixels = (image[0] * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    if isinstance(quality, int):
        options: dict[str, Any] = {"quality": quality}
    else:
        factor = 50 / quality if quality < 50 else 2 - quality / 50
        tables = [[min(max(round(entry * factor), 1), 255) for entry in base] for base in (_LUMA, _CHROMA)]
        options = {"qtables": tables}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", subsampling="4:2:0", **options)
    with Image.open(file) as decoded:
        data = torch.frombuffer(bytearray(decoded.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.view(*pixels.shape).permute(2, 0, 1)[None].float() / 255
