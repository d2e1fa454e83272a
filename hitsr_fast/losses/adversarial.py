"""The hinge losses of a decoder and a discriminator, whose gradients do not meet."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Discriminator = Callable[[Tensor], Tensor]


def discriminator_loss(discriminator: Discriminator, output: Tensor, target: Tensor) -> Tensor:
    """What teaches the discriminator: `(mean relu(1 - D(target)) + mean relu(1 + D(output))) / 2`.

    Args:
        discriminator: From images to scores `(B, ...)`, each image's its own.
        output, target: Floating, `(B, 3, H, W)`; no gradient goes to them.

    Returns:
        `(B,)`.

    Notes:
        Source: geometric GAN (arXiv 1705.02894); VQGAN (arXiv 2012.09841) trains its decoder so.
    """
    real = F.relu(1.0 - discriminator(target.detach()).flatten(1)).mean(1)
    fake = F.relu(1.0 + discriminator(output.detach()).flatten(1)).mean(1)
    return (real + fake) / 2


def generator_loss(discriminator: Discriminator, output: Tensor) -> Tensor:
    """What teaches the decoder: `-mean D(output)`, with a gradient to the output alone.

    It is taken here, with respect to the images, and handed on when the loss is differentiated: so the same
    backward pass that gives the discriminator the gradient of its own loss gives it none of this one.

    Args:
        discriminator: As above.
        output: Floating, `(B, 3, H, W)`.

    Returns:
        `(B,)`. It is differentiated once.
    """
    with torch.enable_grad():
        image = output.detach().requires_grad_()
        loss = -discriminator(image).flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(loss.sum(), image)
    # The difference is 0: it adds nothing but a gradient.
    return loss.detach() + ((output - output.detach()) * gradient).sum((1, 2, 3))
