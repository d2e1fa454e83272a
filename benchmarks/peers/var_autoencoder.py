"""VAR's VQVAE in eager PyTorch: attributes, state dict and results of the published class, any size.

What the sampler, the tokenizer and teacher forcing of VAR call is here; the training of the VQVAE is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.var_quantizer import EagerQuantizer, Encoded, Scale


class ConvBlock(nn.Module):
    """Norm, SiLU, 3x3 twice, beside a shortcut."""

    def __init__(self, wide_in: int, wide_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(wide_in)
        self.conv1 = nn.Conv2d(wide_in, wide_out, 3, padding=1)
        self.norm2 = _norm(wide_out)
        self.conv2 = nn.Conv2d(wide_out, wide_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if wide_in == wide_out else nn.Conv2d(wide_in, wide_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return self.nin_shortcut(x) + h


class MapAttention(nn.Module):
    """One head over all positions of a map, by an explicit matrix of scores."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        scores = torch.bmm(q.transpose(1, 2).contiguous(), k.contiguous()) * x.shape[1] ** -0.5
        mixed = torch.bmm(v.contiguous(), scores.softmax(dim=2).transpose(1, 2).contiguous())
        return x + self.proj_out(mixed.view(x.shape))


class Half(nn.Module):
    """To half the side: a stride-2 convolution, padded at the right and the bottom."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """To twice the side: nearest, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Module):
    """Blocks of one resolution, with attention behind each at the coarsest."""

    def __init__(self, wide_in: int, wide_out: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ConvBlock(wide_out if i else wide_in, wide_out) for i in range(blocks))
        self.attn = nn.ModuleList(MapAttention(wide_out) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    """Block, attention, block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            ConvBlock(width, width),
            MapAttention(width),
            ConvBlock(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image to latent."""

    def __init__(self, ch: int, ch_mult: Sequence[int], z_channels: int) -> None:
        super().__init__()
        widths = [ch, *(ch * m for m in ch_mult)]
        last = len(ch_mult) - 1
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(len(ch_mult)):
            stage = Stage(widths[i], widths[i + 1], 2, attention=i == last)
            if i != last:
                stage.downsample = Half(widths[i + 1])
            self.down.append(stage)
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            h = stage(h)
            if stage is not self.down[-1]:
                h = stage.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h)), inplace=True))


class Decoder(nn.Module):
    """Latent to image."""

    def __init__(self, ch: int, ch_mult: Sequence[int], z_channels: int) -> None:
        super().__init__()
        widths = [*(ch * m for m in ch_mult), ch * ch_mult[-1]]
        last = len(ch_mult) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        stages = []
        for i in reversed(range(len(ch_mult))):
            stage = Stage(widths[i + 1], widths[i], 3, attention=i == last)
            if i:
                stage.upsample = Double(widths[i])
            stages.insert(0, stage)
        self.up = nn.ModuleList(stages)
        self.norm_out = _norm(ch * ch_mult[0])
        self.conv_out = nn.Conv2d(ch * ch_mult[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            h = stage(h)
            if stage is not self.up[0]:
                h = stage.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h), inplace=True))


class Phi(nn.Conv2d):
    """`(1 - r) h + r conv(h)`."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__(width, width, 3, padding=1)
        self.resi_ratio = abs(ratio)

    def forward(self, h: Tensor) -> Tensor:
        return h.mul(1 - self.resi_ratio) + super().forward(h).mul(self.resi_ratio)


class SharedPhi(nn.Module):
    """One for all scales."""

    def __init__(self, phi: nn.Module) -> None:
        super().__init__()
        self.qresi = phi

    def __getitem__(self, position: float) -> nn.Module:
        return self.qresi


class PartlySharedPhi(nn.Module):
    """A few, found by position."""

    def __init__(self, phis: Sequence[nn.Module]) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(phis)
        self.ticks = _ticks(len(phis))

    def __getitem__(self, position: float) -> nn.Module:
        return self.qresi_ls[int(np.argmin(np.abs(self.ticks - position)))]


class SeparatePhi(nn.ModuleList):
    """One a scale, found by position."""

    def __init__(self, phis: Sequence[nn.Module]) -> None:
        super().__init__(phis)
        self.ticks = _ticks(len(phis))

    def __getitem__(self, position: float) -> nn.Module:
        return super().__getitem__(int(np.argmin(np.abs(self.ticks - position))))


class VectorQuantizer2(nn.Module):
    """The quantizer by VAR's names; the loops over all scales are those of `EagerQuantizer`."""

    def __init__(
        self,
        vocab_size: int,
        Cvae: int,
        using_znorm: bool,
        beta: float = 0.25,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[int] = (),
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
    ) -> None:
        super().__init__()
        self.vocab_size, self.Cvae, self.using_znorm, self.beta = vocab_size, Cvae, using_znorm, beta
        self.v_patch_nums = tuple(v_patch_nums)
        self.quant_resi_ratio = quant_resi
        self.record_hit, self.prog_si = 0, -1
        count = share_quant_resi or default_qresi_counts or len(self.v_patch_nums)
        phis = [Phi(Cvae, quant_resi) if abs(quant_resi) > 1e-6 else nn.Identity() for _ in range(count)]
        if share_quant_resi == 0:
            self.quant_resi = SeparatePhi(phis)
        else:
            self.quant_resi = SharedPhi(phis[0]) if share_quant_resi == 1 else PartlySharedPhi(phis)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.v_patch_nums), vocab_size))
        self.embedding = nn.Embedding(vocab_size, Cvae)

    def loops(self) -> EagerQuantizer:
        """The eager quantizer, with a copy of these weights."""
        phis = [phi for phi in self.quant_resi.modules() if isinstance(phi, Phi)]
        weight = (
            torch.zeros(1, self.Cvae, self.Cvae, 3, 3) if not phis else torch.stack([p.weight for p in phis])
        )
        bias = torch.zeros(1, self.Cvae) if not phis else torch.stack([p.bias for p in phis])
        return EagerQuantizer(
            self.embedding.weight,
            weight,
            bias,
            self.v_patch_nums,
            znorm=self.using_znorm,
            beta=self.beta,
            ratio=abs(self.quant_resi_ratio),
        )

    @torch.no_grad()
    def f_to_idxBl_or_fhat(
        self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Sequence[Scale] | None = None
    ) -> list[Tensor]:
        """Indices of each scale, or the reconstruction after it."""
        encoded: Encoded = self.loops().encode(f_BChw, scales=v_patch_nums, every_map=to_fhat)
        return encoded.maps if to_fhat else encoded.indices

    @torch.no_grad()
    def idxBl_to_var_input(self, gt_ms_idx_Bl: Sequence[Tensor]) -> Tensor:
        """What teacher forcing feeds."""
        return self.loops().teacher_inputs(gt_ms_idx_Bl)

    def get_next_autoregressive_input(
        self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The sampler's step: `EagerQuantizer.step`, but on the weights themselves."""
        side, last = self.v_patch_nums[-1], si == SN - 1
        if not last:
            h_BChw = F.interpolate(h_BChw, size=(side, side), mode="bicubic")
        f_hat.add_(self.quant_resi[si / (SN - 1)](h_BChw))
        if last:
            return f_hat, f_hat
        following = self.v_patch_nums[si + 1]
        return f_hat, F.interpolate(f_hat, size=(following, following), mode="area")


class VQVAE(nn.Module):
    """The tokenizer by VAR's names.

    Args:
        vocab_size: K.
        z_channels: C.
        ch: base width, a multiple of 32.
        ch_mult: width of each resolution over `ch`; a side shrinks by 2 between two of them.
        using_znorm, beta, quant_resi, share_quant_resi, default_qresi_counts, v_patch_nums: of the quantizer.
    """

    def __init__(
        self,
        vocab_size: int = 4096,
        z_channels: int = 32,
        ch: int = 160,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        *,
        using_znorm: bool = False,
        beta: float = 0.25,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    ) -> None:
        super().__init__()
        self.V = self.vocab_size = vocab_size
        self.Cvae = z_channels
        self.downsample = 2 ** (len(ch_mult) - 1)
        self.encoder = Encoder(ch, ch_mult, z_channels)
        self.decoder = Decoder(ch, ch_mult, z_channels)
        self.quantize = VectorQuantizer2(
            vocab_size,
            z_channels,
            using_znorm,
            beta,
            default_qresi_counts,
            v_patch_nums,
            quant_resi,
            share_quant_resi,
        )
        self.quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 3, padding=1)
        self.eval().requires_grad_(False)

    def fhat_to_img(self, f_hat: Tensor) -> Tensor:
        """Latent to image in [-1, 1]."""
        return self.decoder(self.post_quant_conv(f_hat)).clamp_(-1, 1)

    def img_to_idxBl(self, image: Tensor, v_patch_nums: Sequence[Scale] | None = None) -> list[Tensor]:
        """Image in [-1, 1] to the indices of each scale."""
        latent = self.quant_conv(self.encoder(image))
        return self.quantize.f_to_idxBl_or_fhat(latent, to_fhat=False, v_patch_nums=v_patch_nums)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


def _ticks(count: int) -> np.ndarray:
    """Positions from 0 to 1 of `count` phis."""
    margin = 1 / 3 / count if count == 4 else 1 / 2 / count
    return np.linspace(margin, 1 - margin, count)
