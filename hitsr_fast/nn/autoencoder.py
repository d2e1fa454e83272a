"""VAR's convolutional autoencoder, with VAR's module names, so that its weights load as they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.ops.group_norm_silu import group_norm_silu

GROUPS, EPS = 32, 1e-6  # VAR's, of each group norm


class Norm(nn.GroupNorm):
    """VAR's group norm, of a contiguous copy.

    PyTorch's `group_norm` loses the digits of channels-last maps in float32 on a CPU where their mean is
    large beside their deviation (at 100 times, two to four of them).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())


class NormSiLU(Norm):
    """Group norm, then SiLU: what each 3x3 convolution but those that change the resolution takes.

    By `group_norm_silu`, in training too, in whichever layout.
    """

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, eps=self.eps)


class ResidualBlock(nn.Module):
    """norm, SiLU, 3x3 twice, plus the input (through a 1x1 where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = NormSiLU(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = NormSiLU(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        out: Tensor = self.nin_shortcut(x) + h
        return out


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions of a map, with residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, c, h * w).transpose(2, 3).unbind(1)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        projected: Tensor = self.proj_out(out.transpose(1, 2).reshape(b, c, h, w))
        return x + projected


class Downsample(nn.Module):
    """Stride-2 3x3 convolution, padded by one at the right and the bottom only (VAR)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Mid(nn.Module):
    """The coarsest stage: block, attention, block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = SpatialAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Level(nn.Module):
    """One resolution: residual blocks, with attention at the coarsest, then the change of resolution.

    Args:
        widths: In and out of each residual block.
        attention: Whether this is the coarsest.
        change: `Downsample` or `Upsample`, if the resolution changes; the module has its name.
    """

    def __init__(
        self, widths: list[tuple[int, int]], attention: bool, change: type[Downsample | Upsample] | None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(i, o) for i, o in widths)
        self.attn = nn.ModuleList(SpatialAttention(o) for _, o in widths if attention)
        self.change = "" if change is None else change.__name__.lower()
        if change is not None:
            self.add_module(self.change, change(widths[-1][1]))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return getattr(self, self.change)(x) if self.change else x


class Encoder(nn.Module):
    """Image `(B, 3, H, W)` in [-1, 1] to latent `(B, C, H / stride, W / stride)` (VAR, VQVAE encoder).

    Args:
        channels: Base width.
        channel_multipliers: Width of each level over `channels`.
        residual_blocks: Residual blocks of a level.
        code_dim: Width of the latent.
        stem_patch: Side of the pixel-unshuffle before the first convolution.
        linear_skip: Add a linear map of each stride x stride patch to the latent (see `TokenizerConfig`).
    """

    def __init__(
        self,
        channels: int,
        channel_multipliers: tuple[int, ...],
        residual_blocks: int,
        code_dim: int,
        stem_patch: int,
        linear_skip: bool,
    ) -> None:
        super().__init__()
        self.stem_patch = stem_patch
        levels = [channels * m for m in channel_multipliers]
        self.conv_in = nn.Conv2d(3 * stem_patch**2, channels, 3, padding=1)
        self.down = nn.ModuleList()
        width = channels
        for i, out in enumerate(levels):
            last = i == len(levels) - 1
            widths = [(width, out)] + [(out, out)] * (residual_blocks - 1)
            self.down.append(Level(widths, attention=last, change=None if last else Downsample))
            width = out
        self.mid = Mid(width)
        self.norm_out = NormSiLU(width)
        self.conv_out = nn.Conv2d(width, code_dim, 3, padding=1)
        self.stride = stem_patch * 2 ** (len(levels) - 1)
        self.skip = nn.Conv2d(3 * self.stride**2, code_dim, 1) if linear_skip else None

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(image, self.stem_patch))
        for level in self.down:
            x = level(x)
        out: Tensor = self.conv_out(self.norm_out(self.mid(x)))
        return out if self.skip is None else out + self.skip(F.pixel_unshuffle(image, self.stride))


class Decoder(nn.Module):
    """Latent `(B, C, h, w)` to image `(B, 3, h * stride, w * stride)`, about [-1, 1] (VAR, VQVAE decoder).

    The 3x3 `post_quant_conv` is part of it, since each target of HIT-VAR has its own. A level has one
    residual block more than the encoder's. `lr_input` adds two ways in for the low-resolution image at the
    output's size (see `TokenizerConfig.decoder_lr`): into the features before the finest level, at first
    closed, and a linear filter of its difference from the output, at first half of it.
    """

    def __init__(
        self,
        channels: int,
        channel_multipliers: tuple[int, ...],
        residual_blocks: int,
        code_dim: int,
        stem_patch: int,
        linear_skip: bool,
        lr_input: bool = False,
    ) -> None:
        super().__init__()
        self.stem_patch = stem_patch
        levels = [channels * m for m in channel_multipliers]
        width = levels[-1]
        self.post_quant_conv = nn.Conv2d(code_dim, code_dim, 3, padding=1)
        lr_width = levels[min(1, len(levels) - 1)]
        self.conv_in = nn.Conv2d(code_dim, width, 3, padding=1)
        self.mid = Mid(width)
        up: list[nn.Module] = []
        for i in reversed(range(len(levels))):
            widths = [(width, levels[i])] + [(levels[i], levels[i])] * residual_blocks
            up.insert(0, Level(widths, i == len(levels) - 1, Upsample if i > 0 else None))
            width = levels[i]
        self.up = nn.ModuleList(up)
        self.norm_out = NormSiLU(width)
        self.conv_out = nn.Conv2d(width, 3 * stem_patch**2, 3, padding=1)
        self.stride = stem_patch * 2 ** (len(levels) - 1)
        self.skip = nn.Conv2d(code_dim, 3 * self.stride**2, 1) if linear_skip else None
        patch = 3 * stem_patch**2
        self.lr_in = nn.Conv2d(patch, lr_width, 3, padding=1, bias=False) if lr_input else None
        self.lr_out = nn.Conv2d(patch, patch, 3, padding=1, bias=False) if lr_input else None
        if self.lr_in is not None and self.lr_out is not None:
            nn.init.zeros_(self.lr_in.weight)
            nn.init.dirac_(self.lr_out.weight).data.mul_(0.5)

    def forward(self, latent: Tensor, lr: Tensor | None = None) -> Tensor:
        latent = self.post_quant_conv(latent)
        x = self.mid(self.conv_in(latent))
        for level in reversed(self.up[1:]):
            x = level(x)
        if self.lr_in is not None and lr is not None:
            x = x + self.lr_in(F.pixel_unshuffle(lr, self.stem_patch))
        x = self.up[0](x)
        image = F.pixel_shuffle(self.conv_out(self.norm_out(x)), self.stem_patch)
        if self.skip is not None:
            image = image + F.pixel_shuffle(self.skip(latent), self.stride)
        if self.lr_out is not None and lr is not None:
            difference = F.pixel_unshuffle(lr - image, self.stem_patch)
            image = image + F.pixel_shuffle(self.lr_out(difference), self.stem_patch)
        return image


def resize(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize `(B, 3, H, W)`, antialiased, by "bicubic", "bilinear" or "area"; identity when sizes match.

    In float32 at least, for the antialiased filters have no 16-bit version on the CPU; the dtype stays.
    """
    if tuple(image.shape[-2:]) == size:
        return image
    if mode == "area":
        return F.adaptive_avg_pool2d(image, size)
    wide = image.to(torch.promote_types(image.dtype, torch.float32))
    return F.interpolate(wide, size=size, mode=mode, antialias=True, align_corners=False).to(image.dtype)
