"""How far a quantized latent is from the latent: the loss of codebook and phi, and of the encoder."""

from __future__ import annotations

from torch import Tensor

# A smaller variance of a latent counts as this: that of an image of one colour is next to nothing.
MIN_VARIANCE = 0.01


def codebook_loss(quantized: Tensor, latent: Tensor, commitment: float = 0.0) -> Tensor:
    """Squared error of each quantized latent, in units of the latent's own variance.

    Args:
        quantized: Floating, `(B, C, h, w)`, with a gradient to codebook and phi.
        latent: Floating, `(B, C, h, w)`.
        commitment: Weight of the term that draws the latent to its codes; the only one with a gradient to it.

    Returns:
        `(B,)`, of each sample `(mse(q, sg(z)) + commitment * mse(z, sg(q))) / max(var(sg(z)), MIN_VARIANCE)`.

    Notes:
        Source: VQ-VAE (arXiv 1711.00937), equation 3, whose second and third term this is.

    Example:
        >>> import torch
        >>> latent = torch.tensor([[[[-1.0, 1.0]]]])
        >>> codebook_loss(latent + 1, latent, commitment=0.5)
        tensor([0.7500])
    """
    target = latent.detach()
    loss = (quantized - target).square().mean((1, 2, 3))
    if commitment > 0:
        loss = loss + commitment * (latent - quantized.detach()).square().mean((1, 2, 3))
    return loss / target.var((1, 2, 3)).clamp_min(MIN_VARIANCE)
