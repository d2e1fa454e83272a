"""What is done with a codebook: filling it, making mistakes with it, starting the classifier from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hitsr_fast.models import HitTransformer
from hitsr_fast.models.hit_var.tokenizer import quantizer_of
from hitsr_fast.nn import ResidualQuantizer
from hitsr_fast.ops import nearest_code, residual_decode
from hitsr_fast.train.codebook import fill_codebook
from hitsr_fast.train.draw import Draw
from hitsr_fast.train.self_correction import code_neighbours, tokenize_with_mistakes
from hitsr_fast.train.tasks.next_scale import init_head
from tests.models.micro import MICRO, micro_model
from tests.tolerances import TOLERANCES

CONFIG = MICRO.tokenizer
ENDS = (0, *CONFIG.pyramid.ends)
CLOSE = TOLERANCES["float32_reordered"]._asdict()


def random_latents(batch: int, seed: int = 0) -> list[Tensor]:
    """Latents of some correlation from place to place, as images have."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, CONFIG.code_dim, 3, 3, generator=generator)
    return [
        torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
        + 0.3 * torch.randn(batch, CONFIG.code_dim, size, size, generator=generator)
        for size in CONFIG.target_sizes
    ]


def draw_of(samples: int) -> Draw:
    return Draw(0, "phase", torch.arange(samples), "cpu")


@torch.no_grad()
def relative_error(quantizer: ResidualQuantizer, latents: list[Tensor]) -> float:
    _, reconstructions = quantizer.tokenize(latents)
    return float((reconstructions[-1] - latents[-1]).square().mean() / latents[-1].var())


def test_fill_codebook_uses_most_codes_and_lowers_the_error() -> None:
    quantizer = quantizer_of(CONFIG)
    latents, unseen = random_latents(32), random_latents(8, seed=1)
    before = relative_error(quantizer, unseen)
    report = fill_codebook(quantizer, latents)
    assert report["codes_used"] > 0.9
    assert quantizer.tokenize(latents).indices.unique().numel() > 0.9 * CONFIG.codebook_size
    assert relative_error(quantizer, unseen) < 0.5 * before


def test_fill_codebook_sets_phi_to_the_identity() -> None:
    quantizer = quantizer_of(CONFIG)
    fill_codebook(quantizer, random_latents(16), rounds=1, iterations=1)
    indices = torch.randint(CONFIG.codebook_size, (1, 64))
    plain = residual_decode(
        indices,
        quantizer.codebook,
        quantizer.phi_weight,
        quantizer.phi_bias,
        scales=[8],
        phi_index=[2],
        size=(8, 8),
    ).reconstruction
    codes = quantizer.codebook[indices[0]].T.reshape(1, -1, 8, 8)
    torch.testing.assert_close(plain, codes, **CLOSE)


def test_fill_codebook_repeats_with_its_seed() -> None:
    books = []
    for seed in (0, 0, 1):
        quantizer = quantizer_of(CONFIG)
        fill_codebook(quantizer, random_latents(16), rounds=2, iterations=2, seed=seed)
        books.append(quantizer.codebook.detach().clone())
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[0], books[2])


def test_a_plain_codebook_fits_the_last_target_alone() -> None:
    """Its error there is that of VAR's tokens, which owe nothing to smaller images, and lower."""
    errors = []
    for hierarchical in (True, False):
        quantizer = quantizer_of(CONFIG)
        latents = random_latents(32)
        given = latents if hierarchical else latents[-1:]
        fill_codebook(quantizer, given, hierarchical=hierarchical)
        with torch.no_grad():
            found = quantizer.quantize(latents[-1]).reconstruction
        errors.append(float((found - latents[-1]).square().mean()))
    assert errors[1] < errors[0]


def test_more_rounds_fit_better() -> None:
    """Later rounds know the residuals that the codes of earlier scales really leave."""
    errors = []
    for rounds in (1, 3):
        quantizer = quantizer_of(CONFIG)
        fill_codebook(quantizer, random_latents(32), rounds=rounds)
        errors.append(relative_error(quantizer, random_latents(32)))
    assert errors[1] < errors[0]


def test_neighbours_are_the_nearest_other_codes() -> None:
    codebook = torch.randn(20, 6)
    found = code_neighbours(codebook, 5)
    assert found.shape == (20, 5)
    for code, neighbours in enumerate(found.tolist()):
        distance = (codebook - codebook[code]).norm(dim=1)
        assert set(neighbours) == set(distance.argsort()[1:6].tolist())


def test_equal_codes_are_neighbours_and_never_their_own() -> None:
    codebook = torch.randn(10, 6).repeat(2, 1)
    found = code_neighbours(codebook, 3)
    codes = torch.arange(20)
    assert not (found == codes[:, None]).any()
    assert torch.equal(found[:, 0], (codes + 10) % 20), "the other of the two is the nearest"


@pytest.mark.parametrize("count", [0, 20])
def test_neighbours_are_no_more_than_the_other_codes(count: int) -> None:
    with pytest.raises(ValueError, match=rf"count: expected a value in \[1, 19\], found {count}"):
        code_neighbours(torch.randn(20, 6), count)


@torch.no_grad()
def test_no_mistakes_is_plain_tokenizing() -> None:
    quantizer = micro_model().tokenizer.quantize
    latents = random_latents(3)
    labels, tokens = tokenize_with_mistakes(
        quantizer, latents, code_neighbours(quantizer.codebook, 5), 0.0, draw_of(3)
    )
    assert torch.equal(labels, tokens)
    assert torch.equal(labels, quantizer.tokenize(latents).indices)


@torch.no_grad()
def test_labels_mend_the_mistakes() -> None:
    """At each step the label is the code nearest to what the tokens so far, mistakes and all, leave over."""
    quantizer = micro_model().tokenizer.quantize
    latents = random_latents(3)
    neighbours = code_neighbours(quantizer.codebook, 5)
    labels, tokens = tokenize_with_mistakes(quantizer, latents, neighbours, 0.6, draw_of(3))
    assert labels.shape == tokens.shape == (3, CONFIG.pyramid.num_tokens)
    wrong = labels != tokens
    assert 0.05 < wrong.float().mean() < 0.6
    assert (neighbours[labels[wrong]] == tokens[wrong][:, None]).any(1).all()
    assert not torch.equal(labels, quantizer.tokenize(latents).indices)

    for step in (2, 5):
        target = 0 if step < 2 else 1 if step < 4 else 2
        start, end = ENDS[step], ENDS[step + 1]
        so_far = quantizer.decode(tokens[:, : ENDS[step]], target).reconstruction
        pooled = torch.nn.functional.adaptive_avg_pool2d(latents[target] - so_far, CONFIG.scales[step])
        rows = pooled.permute(0, 2, 3, 1).reshape(-1, CONFIG.code_dim)
        nearest = nearest_code(rows, quantizer.codebook).view(3, -1)
        # A rounding difference may decide a near tie the other way.
        assert (nearest == labels[:, start:end]).float().mean() > 0.98


@torch.no_grad()
def test_mistakes_come_at_the_drawn_rate() -> None:
    """Rates are even in [0, max], one a sample: the mean is half of it, and samples differ."""
    quantizer = micro_model().tokenizer.quantize
    latents = [latent[:1].expand(200, -1, -1, -1) for latent in random_latents(1)]
    neighbours = code_neighbours(quantizer.codebook, 5)
    labels, tokens = tokenize_with_mistakes(quantizer, latents, neighbours, 0.4, draw_of(200))
    rates = (labels != tokens).float().mean(1)
    assert rates.mean().item() == pytest.approx(0.2, abs=0.03)
    assert rates.min() < 0.05 and 0.33 < rates.max() < 0.55


@torch.no_grad()
def test_the_head_starts_from_the_codebook() -> None:
    """Its logits are negative squared distances to a projection of the token: the nearest code wins."""
    transformer = HitTransformer(MICRO)
    codebook = torch.randn(MICRO.tokenizer.codebook_size, MICRO.tokenizer.code_dim)
    init_head(transformer, codebook)
    tokens = torch.randn(100, MICRO.transformer.width)
    logits = transformer.head(tokens)
    scale = codebook.square().sum(1).mean() / 2
    points = (
        torch.linalg.lstsq(codebook * scale.rsqrt(), transformer.head.weight @ tokens.T).solution.T
        * scale.sqrt()
    )
    expected = -(points[:, None] - codebook).square().sum(-1) / (2 * scale)
    difference = logits - expected
    torch.testing.assert_close(
        difference, difference[:, :1].expand_as(difference), **TOLERANCES["float32_reordered"]._asdict()
    )
    assert 0.1 < logits.std() < 10
