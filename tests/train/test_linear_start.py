"""The linear start is the best linear autoencoder of the patches that it was given."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hitsr_fast.models import HitTokenizer
from hitsr_fast.models.hit_var.config import HIT_TINY
from hitsr_fast.train.linear_start import start_linear
from tests.tolerances import TOLERANCES


def smooth_images(count: int) -> torch.Tensor:
    torch.manual_seed(0)
    return F.avg_pool2d(torch.rand(count, 3, 136, 136) * 2 - 1, 9, stride=1)


def test_start_is_the_best_linear_autoencoder() -> None:
    torch.manual_seed(0)
    tokenizer = HitTokenizer(HIT_TINY.tokenizer)
    images = smooth_images(8)
    kept = start_linear(tokenizer, [images])
    patches = F.pixel_unshuffle(images, tokenizer.config.stride).permute(0, 2, 3, 1).flatten(0, 2)
    with torch.no_grad():
        for target in range(len(tokenizer.decoders)):
            error = F.mse_loss(tokenizer.decode(tokenizer.encode(images), target), images)
            lost = patches.numel() * error / (patches - patches.mean(0)).square().sum()
            torch.testing.assert_close(lost.item(), 1 - kept, **TOLERANCES["float32_reordered"]._asdict())
        latent = tokenizer.encode(images)
    # Mean variance one by construction.
    variance = latent.var(dim=(0, 2, 3)).mean()
    torch.testing.assert_close(variance.item(), 1.0, **TOLERANCES["float32_reordered"]._asdict())


def test_start_needs_the_skip() -> None:
    config = dataclasses.replace(HIT_TINY.tokenizer, linear_skip=False)
    with pytest.raises(ValueError, match="linear_skip=True, found False"):
        start_linear(HitTokenizer(config), [smooth_images(1)])
