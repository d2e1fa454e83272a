"""A linear start for the autoencoder: the principal components of image patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.models.hit_tokenizer import HitTokenizer


@torch.no_grad()
def start_linear(tokenizer: HitTokenizer, images: Sequence[Tensor]) -> float:
    """Set the linear skips to the first `code_dim` principal components of stride x stride patches.

    The convolutions start at zero output and the quant convolutions at the identity, so that the autoencoder starts
    as the best linear one. The latent is scaled to a mean variance of one.

    Args:
        tokenizer: Changed in place; its config must have `linear_skip`.
        images: Batches `(B, 3, H, W)` in [-1, 1] of the sizes to come.

    Returns:
        Share of the patches' variance that the components keep.

    Raises:
        ValueError: If the tokenizer has no linear skip.
    """
    encoder = tokenizer.encoder
    if encoder.skip is None:
        raise ValueError("tokenizer: expected a config with linear_skip=True, got False")
    patches = torch.cat(
        [F.pixel_unshuffle(batch, encoder.stride).permute(0, 2, 3, 1).flatten(0, 2) for batch in images]
    )
    covariance = torch.cov(patches.double().T)
    variances, components = torch.linalg.eigh(covariance)
    kept = slice(-tokenizer.config.code_dim, None)
    basis = components[:, kept].T
    scale = variances[kept].mean().sqrt()
    mean = patches.double().mean(0)
    _set(encoder.skip, basis / scale, -basis @ mean / scale)
    nn.init.zeros_(encoder.conv_out.weight)
    nn.init.zeros_(encoder.conv_out.bias)
    convolutions = [tokenizer.quant_conv]
    for decoder in tokenizer.decoders:
        _set(decoder.skip, basis.T * scale, mean)
        nn.init.zeros_(decoder.conv_out.weight)
        nn.init.zeros_(decoder.conv_out.bias)
        convolutions.append(decoder.post_quant_conv)
    for convolution in convolutions:
        nn.init.dirac_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    return (variances[kept].sum() / variances.sum()).item()


def _set(convolution: nn.Conv2d, matrix: Tensor, bias: Tensor) -> None:
    convolution.weight.copy_(matrix[:, :, None, None])
    convolution.bias.copy_(bias)
