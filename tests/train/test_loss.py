"""The losses as functions, each against its formula in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hitsr_fast.losses.config import ReconstructionLossConfig
from hitsr_fast.losses.latent import codebook_loss
from hitsr_fast.losses.reconstruction import ReconstructionLoss, shared_crop
from hitsr_fast.losses.tokens import token_loss, token_weights
from hitsr_fast.metrics.lpips_weights import LpipsWeightsNotFoundError
from tests.tolerances import TOLERANCES

EXACT = TOLERANCES["float64_reordered"]._asdict()
PIXELS = ReconstructionLossConfig(alex=0.0, vgg=0.0)


@pytest.fixture(autouse=True)
def _without_lpips_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path / "empty"))


def test_pixel_terms_need_no_lpips_weights() -> None:
    a, b = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    generator = torch.Generator()
    assert torch.equal(ReconstructionLoss(PIXELS)(a, b, generator), (a - b).abs().mean())
    l2 = ReconstructionLossConfig(pixel="l2", alex=0.0, vgg=0.0)
    assert torch.equal(ReconstructionLoss(l2)(a, b, generator), (a - b).square().mean())


@pytest.mark.parametrize("weights", [{"alex": 0.1, "vgg": 0.0}, {"alex": 0.0, "vgg": 0.1}])
def test_a_perceptual_term_says_what_it_needs(weights: dict[str, float]) -> None:
    with pytest.raises(LpipsWeightsNotFoundError, match="hitsr-fast weights lpips"):
        ReconstructionLoss(ReconstructionLossConfig(**weights))  # type: ignore[arg-type]


class Recorder(torch.nn.Module):
    """In place of LPIPS: a distance per image, and what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert torch.equal(a + 1, b), "the same crop of both"
        self.seen.append(a)
        return torch.full((len(a),), 2.0)


def test_perceptual_terms_see_crops_and_are_weighted() -> None:
    loss = ReconstructionLoss(PIXELS)
    loss.config = ReconstructionLossConfig(alex=0.5, vgg=0.25, vgg_share=0.5, crop=20, jitter=8)
    loss.alex, loss.vgg = Recorder(), Recorder()  # type: ignore[assignment]
    output = torch.arange(4 * 3 * 48 * 48.0).view(4, 3, 48, 48)
    total = loss(output, output + 1, torch.Generator().manual_seed(0))
    assert total.item() == pytest.approx(1 + 0.5 * 2 + 0.25 * 2)
    assert loss.alex.seen[0].shape == (4, 3, 40, 40)
    assert loss.vgg.seen[0].shape == (2, 3, 20, 20)
    repeated = loss(output, output + 1, torch.Generator().manual_seed(0))
    assert repeated == total
    assert torch.equal(loss.vgg.seen[0], loss.vgg.seen[1]), "crops are the generator's"


def test_shared_crop() -> None:
    image = torch.rand(2, 3, 10, 12)
    generator = torch.Generator().manual_seed(0)
    places = set()
    for _ in range(200):
        a, b = shared_crop(image, image + 1, 8, generator)
        assert a.shape == (2, 3, 8, 8) and torch.equal(a + 1, b)
        places.add(a[0, 0, 0, 0].item())
    assert places == set(image[0, 0, :3, :5].flatten().tolist()), "every place comes up"
    whole, _ = shared_crop(image, image, 64, generator)
    assert torch.equal(whole, image)


def test_token_weights_even_out_the_scales() -> None:
    scales = (2, 3, 4)
    weights = token_weights(scales, balance=1.0)
    assert weights.shape == (29,)
    parts = weights.split([side * side for side in scales])
    for part in parts:
        torch.testing.assert_close(
            part.sum(), torch.tensor(29 / 3), **TOLERANCES["float32_reordered"]._asdict()
        )
    assert token_weights(scales, balance=0.0).eq(1).all()


def test_token_weights_are_a_power_of_the_scales_length() -> None:
    weights = token_weights((1, 2, 4), balance=0.75).double()
    expected = torch.tensor([1.0] * 1 + [4**-0.75] * 4 + [16**-0.75] * 16, dtype=torch.float64)
    torch.testing.assert_close(
        weights, expected * 21 / expected.sum(), **TOLERANCES["float32_reordered"]._asdict()
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_token_loss(smoothing: float) -> None:
    """Its value and gradient: -w (1 - s + s/K) log p of the label, -w s/K log p of each other code."""
    logits = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(7, (3, 5)), torch.rand(5, dtype=torch.float64)
    loss = token_loss(logits, labels, weights, smoothing)
    (found,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        p = logits.exp() / logits.exp().sum(-1, keepdim=True)
        target = torch.full_like(p, smoothing / 7)
        for b in range(3):
            for t in range(5):
                target[b, t, labels[b, t]] += 1 - smoothing
        expected = -(weights[:, None] * target * p.log()).sum() / 15
        torch.testing.assert_close(loss.detach(), expected, **EXACT)
        torch.testing.assert_close(found, weights[:, None] * (p - target) / 15, **EXACT)


@pytest.mark.parametrize("commitment", [0.0, 0.4])
def test_codebook_loss(commitment: float) -> None:
    """Each side takes its own term's gradient: 2 (q - z) / N var and 2 commitment (z - q) / N var."""
    quantized, latent = (torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = codebook_loss(quantized, latent, commitment)
    loss.backward()
    with torch.no_grad():
        difference, n = quantized - latent, latent.numel()
        variance = (latent - latent.mean()).square().sum() / (n - 1)
        expected = (1 + commitment) * difference.square().sum() / n / variance
        torch.testing.assert_close(loss, expected, **EXACT)
        torch.testing.assert_close(quantized.grad, 2 * difference / n / variance, **EXACT)
        if commitment == 0:
            assert latent.grad is None
        else:
            torch.testing.assert_close(latent.grad, -2 * commitment * difference / n / variance, **EXACT)
