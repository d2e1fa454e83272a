"""A linear start for the autoencoder: the principal components of image patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.models import HitTokenizer
from hitsr_fast.nn.autoencoder import Decoder


@torch.no_grad()
def start_linear(tokenizer: HitTokenizer, images: Sequence[Tensor]) -> float:
    """Set the linear skips to the first `code_dim` principal components of stride x stride patches.

    The convolutions start at zero output and the quant convolutions at the identity, so that the autoencoder
    starts as the best linear one. The latent is scaled to a mean variance of one. The images are batches
    `(B, 3, H, W)` in [-1, 1] of the sizes to come.

    Returns:
        Share of the patches' variance that the components keep.

    Raises:
        ValueError: If the tokenizer's config is without `linear_skip`.
    """
    if not tokenizer.config.linear_skip:
        raise ValueError("tokenizer: expected a config with linear_skip=True, found False")
    stride, code_dim = tokenizer.config.stride, tokenizer.config.code_dim
    patches = torch.cat(
        [F.pixel_unshuffle(batch, stride).permute(0, 2, 3, 1).flatten(0, 2).double() for batch in images]
    )
    variances, components = torch.linalg.eigh(torch.cov(patches.T))  # ascending
    basis, kept = components[:, -code_dim:].T, variances[-code_dim:]
    scale, mean = kept.mean().sqrt(), patches.mean(0)
    _set(tokenizer.encoder.skip, basis / scale, -basis @ mean / scale)
    _silence(tokenizer.encoder.conv_out)
    _identity(tokenizer.quant_conv)
    for decoder in tokenizer.decoders:
        assert isinstance(decoder, Decoder)
        _set(decoder.skip, basis.T * scale, mean)
        _silence(decoder.conv_out)
        _identity(decoder.post_quant_conv)
    return float(kept.sum() / variances.sum())


def _set(convolution: nn.Conv2d | None, matrix: Tensor, bias: Tensor) -> None:
    assert convolution is not None and convolution.bias is not None
    convolution.weight.copy_(matrix[:, :, None, None])
    convolution.bias.copy_(bias)


def _silence(convolution: nn.Conv2d) -> None:
    for parameter in convolution.parameters():
        nn.init.zeros_(parameter)


def _identity(convolution: nn.Conv2d) -> None:
    _silence(convolution)
    nn.init.dirac_(convolution.weight)
