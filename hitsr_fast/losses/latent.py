"""How far a quantized latent is from the latent: the loss of codebook and phi, and of the encoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def codebook_loss(quantized: Tensor, latent: Tensor, commitment: float = 0.0) -> Tensor:
    """Squared error of a quantized latent, in units of the latent's variance.

    Args:
        quantized: Floating, `(B, C, h, w)`, with a gradient to codebook and phi.
        latent: Floating, `(B, C, h, w)`.
        commitment: Weight of the term that draws the latent to its codes; the only one with a gradient to it.

    Returns:
        Scalar `(mse(quantized, sg(latent)) + commitment * mse(latent, sg(quantized))) / var(latent)`.

    Notes:
        Source: VQ-VAE (arXiv 1711.00937), equation 3, whose second and third term this is.

    Example:
        >>> import torch
        >>> latent = torch.tensor([[[[-1.0, 1.0]]]])
        >>> codebook_loss(latent + 1, latent, commitment=0.5)
        tensor(0.7500)
    """
    target = latent.detach()
    loss = F.mse_loss(quantized, target)
    if commitment > 0:
        loss = loss + commitment * F.mse_loss(latent, quantized.detach())
    return loss / target.var()
