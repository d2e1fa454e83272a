"""The hierarchical tokenizer: HIT-VAR's Algorithm 1, with one target going on where the one before ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.models import HitTokenizer
from hitsr_fast.models.hit_var.config import HIT_TINY, TokenizerConfig
from hitsr_fast.models.hit_var.tokenizer import enlarged, quantizer_of
from hitsr_fast.nn import ResidualQuantizer
from hitsr_fast.ops import TokenizedPyramid, residual_decode, residual_quantize
from tests.models.micro import MICRO, micro_model
from tests.tolerances import TOLERANCES

CONFIG = MICRO.tokenizer
ENDS = (0, *CONFIG.pyramid.ends)
CLOSE = TOLERANCES["float32_reordered"]._asdict()
SEEDS = st.integers(0, 2**31)
PHI_INDEXINGS: st.SearchStrategy[Literal["global", "per_target"]] = st.sampled_from(["global", "per_target"])


def random_quantizer(seed: int, config: TokenizerConfig = CONFIG) -> ResidualQuantizer:
    generator = torch.Generator().manual_seed(seed)
    quantizer = quantizer_of(config)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return quantizer


def random_latents(seed: int, config: TokenizerConfig = CONFIG, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    return [
        torch.randn(batch, config.code_dim, size, size, generator=generator) for size in config.target_sizes
    ]


def partial(quantizer: ResidualQuantizer, indices: Tensor, steps: int, target: int) -> Tensor:
    """What the first `steps` steps make of target number `target`."""
    size = CONFIG.target_sizes[target]
    if steps == 0:
        return torch.zeros(len(indices), CONFIG.code_dim, size, size)
    return residual_decode(
        indices[:, : ENDS[steps]],
        quantizer.codebook,
        quantizer.phi_weight,
        quantizer.phi_bias,
        scales=CONFIG.scales[:steps],
        phi_index=quantizer.bank(target).phi_index[:steps],
        size=(size, size),
    ).reconstruction


@torch.no_grad()
def tokenized(
    seed: int, phi_indexing: Literal["global", "per_target"] = "global"
) -> tuple[ResidualQuantizer, list[Tensor], TokenizedPyramid]:
    quantizer = random_quantizer(seed, replace(CONFIG, phi_indexing=phi_indexing))
    latents = random_latents(seed)
    return quantizer, latents, quantizer.tokenize(latents)


@given(seed=SEEDS, phi_indexing=PHI_INDEXINGS)
@torch.no_grad()
def test_parts_plus_residual_equal_the_latent(
    seed: int, phi_indexing: Literal["global", "per_target"]
) -> None:
    """Latent minus the parts so far is what each step really searched: its codes are the nearest to it."""
    quantizer, latents, (indices, reconstructions) = tokenized(seed, phi_indexing)
    for target, latent in enumerate(latents):
        parts = torch.zeros_like(latent)
        first_own = CONFIG.pyramid.steps[target - 1] if target else 0
        for step in range(CONFIG.pyramid.steps[target]):
            residual = latent - parts
            if step >= first_own:
                scale = CONFIG.scales[step]
                rows = F.adaptive_avg_pool2d(residual, scale).flatten(2).transpose(1, 2)
                start = ENDS[step]
                chosen = quantizer.codebook[indices[:, start : start + scale * scale]]
                nearest = (rows[:, :, None] - quantizer.codebook).norm(dim=-1).amin(-1)
                found = (rows - chosen).norm(dim=-1)
                torch.testing.assert_close(found, nearest, **CLOSE)
            added = partial(quantizer, indices, step + 1, target) - partial(quantizer, indices, step, target)
            parts = parts + added
        torch.testing.assert_close(parts, reconstructions[target], **CLOSE)


@given(seed=SEEDS, phi_indexing=PHI_INDEXINGS)
@torch.no_grad()
def test_indices_decode_to_the_reconstruction(
    seed: int, phi_indexing: Literal["global", "per_target"]
) -> None:
    quantizer, _, (indices, reconstructions) = tokenized(seed, phi_indexing)
    for target, reconstruction in enumerate(reconstructions):
        torch.testing.assert_close(quantizer.decode(indices, target).reconstruction, reconstruction, **CLOSE)


@given(seed=SEEDS)
@torch.no_grad()
def test_coarse_tokens_are_a_prefix(seed: int) -> None:
    quantizer, latents, (indices, reconstructions) = tokenized(seed)
    assert indices.shape == (2, CONFIG.pyramid.num_tokens)
    for count, steps in enumerate(CONFIG.pyramid.steps, start=1):
        coarse = quantizer.tokenize(latents[:count])
        assert torch.equal(coarse.indices, indices[:, : ENDS[steps]])
        for a, b in zip(coarse.reconstructions, reconstructions, strict=False):
            assert torch.equal(a, b)


@given(seed=SEEDS, step=st.integers(0, len(CONFIG.scales) - 1))
@torch.no_grad()
def test_a_change_in_a_scale_leaves_earlier_scales_alone(seed: int, step: int) -> None:
    quantizer, _, (indices, _) = tokenized(seed)
    start, end = ENDS[step], ENDS[step + 1]
    changed = indices.clone()
    changed[:, start:end] = (changed[:, start:end] + 1) % CONFIG.codebook_size
    for target, steps in enumerate(CONFIG.pyramid.steps):
        for earlier in range(1, min(step, steps) + 1):
            before, after = (partial(quantizer, i, earlier, target) for i in (indices, changed))
            assert torch.equal(before, after)
        before, after = (quantizer.decode(i, target).reconstruction for i in (indices, changed))
        assert torch.equal(before, after) == (steps <= step)


@given(seed=SEEDS, target=st.integers(1, 2))
@torch.no_grad()
def test_a_finer_image_leaves_coarser_tokens_alone(seed: int, target: int) -> None:
    quantizer, latents, (indices, reconstructions) = tokenized(seed)
    latents[target] = latents[target] + 1.0
    changed = quantizer.tokenize(latents)
    kept = ENDS[CONFIG.pyramid.steps[target - 1]]
    assert torch.equal(changed.indices[:, :kept], indices[:, :kept])
    assert not torch.equal(changed.indices[:, kept:], indices[:, kept:])
    for a, b in zip(changed.reconstructions[:target], reconstructions, strict=False):
        assert torch.equal(a, b)


def test_gradients_reach_codebook_and_phi_only() -> None:
    quantizer = random_quantizer(0)
    latents = [latent.requires_grad_() for latent in random_latents(0)]
    sum(r.square().mean() for r in quantizer.tokenize(latents).reconstructions).backward()  # type: ignore[union-attr]
    for parameter in quantizer.parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    assert all(latent.grad is None for latent in latents)


@torch.no_grad()
def test_tokenize_encodes_the_image_at_each_target_size() -> None:
    tokenizer = micro_model().tokenizer
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    pyramid = tokenizer.pyramid(image)
    assert [tuple(level.shape) for level in pyramid] == [(2, 3, 8, 8), (2, 3, 16, 16), (2, 3, 32, 32)]
    assert pyramid[-1] is image
    indices, reconstructions = tokenizer.tokenize(image)
    direct = tokenizer.quantize.tokenize([tokenizer.encode(level) for level in pyramid])
    assert torch.equal(indices, direct.indices)
    two = tokenizer.tokenize(image, targets=2)
    assert torch.equal(two.indices, indices[:, : two.indices.shape[1]])

    images = tokenizer.decode_indices(indices)
    assert [tuple(out.shape) for out in images] == [tuple(level.shape) for level in pyramid]
    for target, out in enumerate(images):
        torch.testing.assert_close(out, tokenizer.decode(reconstructions[target], target), **CLOSE)
    (only,) = tokenizer.decode_indices(indices, [1])
    assert torch.equal(only, images[1])


@torch.no_grad()
def test_rectangular_images_at_op_level() -> None:
    """The convolutions and the ops take any sides; the pyramid's tiles are square."""
    tokenizer = micro_model().tokenizer
    quantizer = tokenizer.quantize
    latent = tokenizer.encode(torch.rand(1, 3, 24, 40) * 2 - 1)
    assert latent.shape == (1, CONFIG.code_dim, 6, 10)
    scales = [(1, 2), (3, 5), (6, 10)]
    bank = (quantizer.codebook, quantizer.phi_weight, quantizer.phi_bias)
    out = residual_quantize(latent, *bank, scales=scales, phi_index=[0, 1, 3])
    decoded = residual_decode(out.indices, *bank, scales=scales, phi_index=[0, 1, 3], size=(6, 10))
    torch.testing.assert_close(decoded.reconstruction, out.reconstruction, **CLOSE)
    assert tokenizer.decode(out.reconstruction, 2).shape == (1, 3, 24, 40)


def test_wrong_shapes_are_errors() -> None:
    tokenizer = HitTokenizer(CONFIG)
    for shape in ((1, 3, 32, 16), (3, 32, 32), (1, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"image: expected \(B, 3, 32, 32\), found"):
            tokenizer.pyramid(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"latents\[0\]: expected a map of size \(2, 2\), found \(8, 8\)"):
        tokenizer.quantize.tokenize([torch.zeros(1, 6, 8, 8)])
    with pytest.raises(ValueError, match="latents: expected at least one map, found none"):
        tokenizer.quantize.tokenize([])


def test_area_pyramid() -> None:
    tokenizer = HitTokenizer(replace(CONFIG, resize_mode="area"))
    image = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(
        tokenizer.pyramid(image)[0],
        image.unflatten(-1, (8, 4)).unflatten(-3, (8, 4)).mean((-1, -3)),
        **CLOSE,
    )


def test_lr_tiles_are_enlarged_bilinearly() -> None:
    lr = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    for target, side in ((0, 32), (1, 64), (2, 128), (-1, 128)):
        up = enlarged(lr, HIT_TINY.tokenizer, target)
        assert up.shape == (1, 3, side, side)
        inner = up[..., 4:-4].diff(dim=-1)
        torch.testing.assert_close(inner, torch.full_like(inner, 2 / 31 * 32 / side))
