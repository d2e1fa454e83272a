"""`PatchDiscriminator`: scores of overlapping patches of an image."""

from __future__ import annotations

from torch import Tensor, nn

from hitsr_fast.nn.autoencoder import GROUPS, Norm


class PatchDiscriminator(nn.Module):
    """Image `(B, 3, H, W)`, sides of at least 8, to scores `(B, 1, H // 8, W // 8)`, high for real ones.

    PatchGAN's stack of strided 4x4 convolutions, with two differences: group norm in place of batch norm, so
    that an image's scores are its own whatever it is batched with, and 3x3 convolutions at the end, so that
    small images are taken too. A score sees 54 x 54 pixels.

    Args:
        channels: Width after the first convolution, a multiple of 32; the others have two, four and eight
            times as many.

    Notes:
        Source: pix2pix (arXiv 1611.07004), section 3.2.2.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        if channels < 1 or channels % GROUPS:
            raise ValueError(f"channels: expected a multiple of {GROUPS}, found {channels}")
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for factor in (1, 2):
            width = channels * factor
            layers += [nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False)]
            layers += [Norm(2 * width), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(4 * channels, 8 * channels, 3, padding=1, bias=False)]
        layers += [Norm(8 * channels), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * channels, 1, 3, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        scores: Tensor = self.layers(image)
        return scores
