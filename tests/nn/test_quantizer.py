"""The walk that feeds the sampler, against decoding from scratch at every step."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.models.hit_var.config import TokenizerConfig
from hitsr_fast.models.hit_var.tokenizer import quantizer_of
from hitsr_fast.nn import ReconstructionWalk, ResidualQuantizer
from hitsr_fast.ops import residual_decode
from tests.tolerances import TOLERANCES

Grid = Literal["target", "full"]

CONFIG = TokenizerConfig(
    code_dim=6, codebook_size=48, channels=32, scales=(1, 2, 3, 4, 6, 8), targets=(0.25, 0.5, 1.0)
)
LENGTHS = [scale * scale for scale in CONFIG.scales]
CLOSE = TOLERANCES["float32_reordered"]._asdict()


def random_quantizer(seed: int = 0, config: TokenizerConfig = CONFIG) -> ResidualQuantizer:
    generator = torch.Generator().manual_seed(seed)
    quantizer = quantizer_of(config)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return quantizer


def random_tokens(seed: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(CONFIG.codebook_size, (batch, CONFIG.pyramid.num_tokens), generator=generator)


def decoded(quantizer: ResidualQuantizer, tokens: Tensor, steps: int, target: int) -> Tensor:
    size = CONFIG.target_sizes[target]
    return residual_decode(
        tokens[:, : sum(LENGTHS[:steps])],
        quantizer.codebook,
        quantizer.phi_weight,
        quantizer.phi_bias,
        scales=CONFIG.scales[:steps],
        phi_index=quantizer.bank(target).phi_index[:steps],
        size=(size, size),
    ).reconstruction


def owner(step: int) -> int:
    """The target that a step belongs to."""
    return next(i for i, steps in enumerate(CONFIG.pyramid.steps) if step < steps)


@pytest.mark.parametrize("ar_grid", ["target", "full"])
@given(seed=st.integers(0, 2**31))
@torch.no_grad()
def test_each_step_is_fed_the_reconstruction_so_far(ar_grid: Grid, seed: int) -> None:
    quantizer, tokens = random_quantizer(seed), random_tokens(seed)
    walk = ReconstructionWalk(quantizer.banks(), quantizer.pyramid, 2, ar_grid=ar_grid)
    for step, chosen in enumerate(tokens.split(LENGTHS, dim=1)):
        found = walk.advance(chosen)
        assert len(walk.finished) == sum(steps <= step + 1 for steps in CONFIG.pyramid.steps)
        if step + 1 == len(CONFIG.scales):
            assert found.shape == (2, 6, 0, 0)
            continue
        grid = owner(step + 1) if ar_grid == "target" else 2
        expected = F.adaptive_avg_pool2d(decoded(quantizer, tokens, step + 1, grid), CONFIG.scales[step + 1])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, **CLOSE)
    for target, latent in enumerate(walk.finished):
        torch.testing.assert_close(latent, quantizer.decode(tokens, target).reconstruction, **CLOSE)


@torch.no_grad()
def test_the_two_grids_differ() -> None:
    quantizer, tokens = random_quantizer(), random_tokens()
    on_target, on_full = (quantizer.teacher_inputs(tokens, ar_grid=grid) for grid in ("target", "full"))
    assert not torch.allclose(on_target, on_full, **CLOSE)
    last = sum(LENGTHS[4:])  # the last target's own grid is the full one
    torch.testing.assert_close(on_target[:, -last:], on_full[:, -last:], **CLOSE)


@pytest.mark.parametrize("ar_grid", ["target", "full"])
@torch.no_grad()
def test_teacher_inputs_are_what_the_sampler_is_fed(ar_grid: Grid) -> None:
    quantizer, tokens = random_quantizer(), random_tokens()
    walk = ReconstructionWalk(quantizer.banks(), quantizer.pyramid, 2, ar_grid=ar_grid)
    fed = [walk.advance(chosen) for chosen in tokens.split(LENGTHS, dim=1)][:-1]
    rows = torch.cat([m.permute(0, 2, 3, 1).reshape(2, -1, 6) for m in fed], 1)
    torch.testing.assert_close(quantizer.teacher_inputs(tokens, ar_grid=ar_grid), rows, **CLOSE)
    assert rows.shape == (2, CONFIG.pyramid.num_tokens - 1, 6)


@torch.no_grad()
def test_the_last_tokens_feed_nothing() -> None:
    quantizer, tokens = random_quantizer(), random_tokens()
    changed = tokens.clone()
    changed[:, -LENGTHS[-1] :] = 0
    assert torch.equal(quantizer.teacher_inputs(tokens), quantizer.teacher_inputs(changed))


@torch.no_grad()
def test_finished_targets_stay_as_they_were() -> None:
    quantizer, tokens = random_quantizer(), random_tokens()
    walk = ReconstructionWalk(quantizer.banks(), quantizer.pyramid, 2)
    kept: list[Tensor] = []
    for chosen in tokens.split(LENGTHS, dim=1):
        walk.advance(chosen)
        kept += [latent.clone() for latent in walk.finished[len(kept) :]]
    assert all(torch.equal(a, b) for a, b in zip(kept, walk.finished, strict=True))


@torch.no_grad()
def test_half_precision_codebook_walks_in_float32() -> None:
    quantizer, tokens = random_quantizer().to(torch.bfloat16), random_tokens()
    walk = ReconstructionWalk(quantizer.banks(), quantizer.pyramid, 2)
    for chosen in tokens.split(LENGTHS, dim=1):
        walk.advance(chosen)
    for target, latent in enumerate(walk.finished):
        assert latent.dtype == torch.float32
        torch.testing.assert_close(latent, quantizer.decode(tokens, target).reconstruction, **CLOSE)
