"""The losses as functions, each against its formula in float64; each sample by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hitsr_fast.losses.adversarial import discriminator_loss, generator_loss
from hitsr_fast.losses.config import ReconstructionLossConfig
from hitsr_fast.losses.latent import MIN_VARIANCE, codebook_loss
from hitsr_fast.losses.preference import preference_loss
from hitsr_fast.losses.reconstruction import ReconstructionLoss, crop_each, over_targets, pixel_loss
from hitsr_fast.losses.tokens import scale_means, token_loss, token_weights
from hitsr_fast.metrics.lpips_weights import LpipsWeightsNotFoundError
from hitsr_fast.nn.discriminator import PatchDiscriminator
from tests.tolerances import TOLERANCES

EXACT = TOLERANCES["float64_reordered"]._asdict()
CLOSE = TOLERANCES["float32_reordered"]._asdict()
PIXELS = ReconstructionLossConfig(alex=0.0, vgg=0.0)


@pytest.fixture(autouse=True)
def _without_lpips_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path / "empty"))


class Numbers:
    """Draws of samples by their indices."""

    def __init__(self, index: list[int]) -> None:
        self.index = index

    def seeds(self, stream: str) -> list[int]:
        names = sum(map(ord, stream))
        generators = [torch.Generator().manual_seed(1000 * names + one) for one in self.index]
        return [int(torch.randint(2**63 - 1, (), generator=generator)) for generator in generators]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_pixel_loss() -> None:
    a, b = double(3, 3, 4, 5), double(3, 3, 4, 5).detach()
    for kind, power, slope in (("l1", 1, (a - b).sign()), ("l2", 2, 2 * (a - b))):
        found = pixel_loss(a, b, kind)  # type: ignore[arg-type]
        expected = (a - b).abs().pow(power).flatten(1).sum(1) / 60
        torch.testing.assert_close(found, expected, **EXACT)
        (gradient,) = torch.autograd.grad(found.sum(), a)
        torch.testing.assert_close(gradient, slope.detach() / 60, **EXACT)
    assert pixel_loss(a.half(), b.half(), "l2").dtype == torch.float32


def test_pixel_terms_need_no_lpips_weights() -> None:
    a, b = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    for config in (PIXELS, replace(PIXELS, pixel="l2")):
        found = ReconstructionLoss(config)(a, b, Numbers([0, 1]))
        assert torch.equal(found, pixel_loss(a, b, config.pixel))


@pytest.mark.parametrize("weights", [{"alex": 0.1, "vgg": 0.0}, {"alex": 0.0, "vgg": 0.1}])
def test_a_perceptual_term_says_what_it_needs(weights: dict[str, float]) -> None:
    with pytest.raises(LpipsWeightsNotFoundError, match="hitsr-fast weights lpips"):
        ReconstructionLoss(ReconstructionLossConfig(**weights))  # type: ignore[arg-type]


class Recorder(nn.Module):
    """In place of LPIPS: the mean of the first image's first pixel, and what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        assert torch.equal(a + 1, b), "the same crop of both"
        self.seen.append(a)
        return a[:, 0, 0, 0]


def recorded(**changes: Any) -> ReconstructionLoss:
    loss = ReconstructionLoss(PIXELS)
    loss.config = replace(PIXELS, **changes)
    loss.alex, loss.vgg = Recorder(), Recorder()  # type: ignore[assignment]
    return loss


def test_perceptual_terms_see_crops_and_are_weighted() -> None:
    """|difference| + 0.5 alex(crop) + 0.25 / 0.5 vgg(crop) of the images that the share hits."""
    loss = recorded(alex=0.5, vgg=0.25, vgg_share=0.5, crop=20, jitter=8)
    output = torch.arange(8 * 3 * 48 * 48.0, dtype=torch.float64).view(8, 3, 48, 48)
    draw = Numbers([*range(8)])
    total = loss(output, output + 1, draw)
    hit = [seed < 2**62 for seed in draw.seeds("vgg/48")]
    assert 0 < sum(hit) < 8
    (alex,), (vgg,) = loss.alex.seen, loss.vgg.seen
    assert alex.shape == (8, 3, 40, 40) and vgg.shape == (sum(hit), 3, 20, 20)
    expected = 1 + 0.5 * alex[:, 0, 0, 0]
    expected[torch.tensor(hit)] += 0.25 / 0.5 * vgg[:, 0, 0, 0]
    torch.testing.assert_close(total, expected, **EXACT)


def test_the_share_of_images_costs_nothing_on_average() -> None:
    """Over many images the term is what it would be on all of them."""
    output = torch.ones(400, 3, 4, 4)
    draw = Numbers([*range(400)])
    shares = [recorded(vgg=1.0, vgg_share=share)(output, output + 1, draw).mean() for share in (1.0, 0.25)]
    assert shares[1].item() == pytest.approx(shares[0].item(), rel=0.15)
    none = recorded(vgg=1.0, vgg_share=1e-9)(output, output + 1, draw)
    assert torch.equal(none, torch.ones(400)), "none was hit"


def test_whole_images() -> None:
    """The paper's: all images, all of their pixels."""
    loss = recorded(pixel="l2", vgg=5.0, vgg_share=1.0, crop=0)
    output = torch.rand(3, 3, 48, 48)
    total = loss(output, output + 1, Numbers([0, 1, 2]))
    assert torch.equal(loss.vgg.seen[0], output)
    torch.testing.assert_close(total, 1 + 5 * output[:, 0, 0, 0], **CLOSE)


def test_a_samples_loss_is_its_own() -> None:
    """Whatever it is batched with, and other with other draws."""
    loss = recorded(alex=0.5, vgg=0.25, vgg_share=0.5, crop=20, jitter=8)
    output = torch.rand(6, 3, 48, 48)
    together = loss(output, output + 1, Numbers([*range(6)]))
    alone = [loss(output[i : i + 1], output[i : i + 1] + 1, Numbers([i])) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, loss(output, output + 1, Numbers([*range(6, 12)])))


def test_crop_each() -> None:
    image = torch.rand(1, 3, 10, 12)
    places = set()
    for seed in Numbers([*range(300)]).seeds("crop"):
        a, b = crop_each(image, image + 1, 8, [seed])
        assert a.shape == (1, 3, 8, 8) and torch.equal(a + 1, b)
        places.add(a[0, 0, 0, 0].item())
    assert places == set(image[0, 0, :3, :5].flatten().tolist()), "every place comes up"
    whole, _ = crop_each(image, image, 64, [5])
    assert torch.equal(whole, image)


@pytest.mark.parametrize("targets", ["mean", "sum"])
def test_over_targets(targets: Any) -> None:
    losses = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    found = over_targets(losses, replace(PIXELS, targets=targets))
    assert found.tolist() == ([2.0, 4.0] if targets == "mean" else [4.0, 8.0])


@pytest.mark.parametrize("commitment", [0.0, 0.4])
def test_codebook_loss(commitment: float) -> None:
    """Each side takes its own term's gradient: 2 (q - z) / n var and 2 commitment (z - q) / n var."""
    quantized, latent = double(3, 2, 4, 4), double(3, 2, 4, 4)
    with torch.no_grad():
        latent[2] *= 1e-3  # as of an image of one colour
    loss = codebook_loss(quantized, latent, commitment)
    loss.sum().backward()
    with torch.no_grad():
        difference, n = quantized - latent, 32
        mean = latent.flatten(1).mean(1)[:, None, None, None]
        variance = ((latent - mean).square().flatten(1).sum(1) / (n - 1)).clamp_min(MIN_VARIANCE)
        assert variance[2] == MIN_VARIANCE < variance[:2].min()
        expected = (1 + commitment) * difference.square().flatten(1).sum(1) / n / variance
        torch.testing.assert_close(loss, expected, **EXACT)
        slope = 2 * difference / n / variance[:, None, None, None]
        torch.testing.assert_close(quantized.grad, slope, **EXACT)
        if commitment == 0:
            assert latent.grad is None
        else:
            torch.testing.assert_close(latent.grad, -commitment * slope, **EXACT)


def test_token_weights_are_a_power_of_the_scales_length() -> None:
    weights = token_weights((1, 4, 16), balance=0.75).double()
    expected = torch.tensor([1.0] * 1 + [4**-0.75] * 4 + [16**-0.75] * 16, dtype=torch.float64)
    torch.testing.assert_close(weights, expected * 21 / expected.sum(), **CLOSE)
    assert token_weights((1, 4, 16), balance=0.0).eq(1).all()
    parts = token_weights((4, 9, 16), balance=1.0).split([4, 9, 16])
    for part in parts:
        torch.testing.assert_close(part.sum(), torch.tensor(29 / 3), **CLOSE)


def test_token_loss_and_scale_means() -> None:
    values, weights = double(3, 5), torch.rand(5, dtype=torch.float64)
    loss = token_loss(values, weights)
    expected = torch.stack([sum(weights[t] * row[t] for t in range(5)) / 5 for row in values])
    torch.testing.assert_close(loss, expected, **EXACT)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    torch.testing.assert_close(gradient, weights.expand(3, 5) / 5, **EXACT)
    found = scale_means(values, (1, 4))
    torch.testing.assert_close(found, torch.stack([values[:, 0].mean(), values[:, 1:].mean()]), **EXACT)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_preference_loss(reduction: Any) -> None:
    """-log sigmoid(beta gap), slope -beta (1 - sigmoid(beta gap)), over the tokens' number for the mean."""
    gap, beta = double(4, 6), 0.7
    loss = preference_loss(gap, beta=beta, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), gap)
    with torch.no_grad():
        share = 6 if reduction == "mean" else 1
        probability = 1 / (1 + torch.exp(-beta * gap.sum(1) / share))
        torch.testing.assert_close(loss, -probability.log(), **EXACT)
        slope = -beta * (1 - probability) / share
        torch.testing.assert_close(gradient, slope[:, None].expand(4, 6), **EXACT)


def test_preference_loss_is_in_float32_and_does_not_overflow() -> None:
    """A sum of thousands of gaps in bfloat16, far out on either side."""
    gap = torch.full((2, 4000), 4.0, dtype=torch.bfloat16)
    gap[1] *= -1
    loss = preference_loss(gap, beta=1.0, reduction="sum")
    assert loss.dtype == torch.float32 and loss.tolist() == [0.0, 16000.0]


class Quadratic(nn.Module):
    """A discriminator whose scores and gradients are known: two patches of an image, w (x - c)^2 summed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def forward(self, image: Tensor) -> Tensor:
        halves = image.flatten(1).unflatten(1, (2, -1))
        return self.weight * halves.square().sum(2) - 1


def test_discriminator_loss() -> None:
    """(mean relu(1 - D(target)) + mean relu(1 + D(output))) / 2, and no gradient to the images."""
    D, output, target = Quadratic(), double(3, 3, 2, 2), double(3, 3, 2, 2)
    with torch.no_grad():
        target *= 0.3
    loss = discriminator_loss(D, output, target)
    real, fake = D(target).detach(), D(output).detach()
    expected = ((1 - real).clamp_min(0).mean(1) + (1 + fake).clamp_min(0).mean(1)) / 2
    torch.testing.assert_close(loss.detach(), expected, **EXACT)
    loss.sum().backward()
    assert output.grad is None and target.grad is None
    slopes = (fake > -1) * (fake + 1) - (real < 1) * (real + 1)  # dD / dw = (D + 1) / w
    torch.testing.assert_close(D.weight.grad, slopes.mean(1).sum() / 2 / 0.8, **EXACT)


def test_generator_loss() -> None:
    """-mean D(output); its gradient goes to the output, and none to the discriminator."""
    D, output = Quadratic(), double(3, 3, 2, 2)
    through = output * 1.0  # as of a decoder
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    loss = generator_loss(D, through)
    torch.testing.assert_close(loss.detach(), -D(output).mean(1).detach(), **EXACT)
    (weights * loss).sum().backward()
    assert D.weight.grad is None
    torch.testing.assert_close(output.grad, -0.8 * output.detach() * weights[:, None, None, None], **EXACT)


@pytest.mark.parametrize("side", [8, 24, 32])
def test_patch_discriminator(side: int) -> None:
    """A score for each 8 x 8 pixels, an image's own, from no more than 54 x 54."""
    D = PatchDiscriminator(32)
    images = torch.rand(3, 3, side, side, requires_grad=True)
    scores = D(images)
    assert scores.shape == (3, 1, side // 8, side // 8)
    torch.testing.assert_close(scores[1:2], D(images[1:2]), **CLOSE)
    (gradient,) = torch.autograd.grad(scores[0].sum(), images)
    assert gradient[0].any() and not gradient[1:].any()


def test_what_a_patch_sees() -> None:
    """Norms aside, which see all of an image."""
    D = PatchDiscriminator(32)
    for i, layer in enumerate(D.layers):
        if isinstance(layer, nn.GroupNorm):
            D.layers[i] = nn.Identity()
    image = torch.rand(1, 3, 128, 128, requires_grad=True)
    (gradient,) = torch.autograd.grad(D(image)[0, 0, 8, 8], image)
    rows = gradient[0].abs().sum((0, 2)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 54


@pytest.mark.parametrize("channels", [0, 48])
def test_patch_discriminator_says_which_widths_it_takes(channels: int) -> None:
    with pytest.raises(ValueError, match=f"channels: expected a multiple of 32, found {channels}"):
        PatchDiscriminator(channels)
