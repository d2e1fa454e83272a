"""The transformer: who sees whom, and what training needs of it. Sampling: test_hit_sampler.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hitsr_fast.models.hit_var.config import HitConfig
from hitsr_fast.models.hit_var.transformer import HitTransformer
from tests.models.micro import MICRO, micro_model
from tests.tolerances import TOLERANCES

SCALES = MICRO.tokenizer.scales
LENGTHS = [scale * scale for scale in SCALES]
TOKENS = MICRO.tokenizer.pyramid.num_tokens
CLASS_FREE = MICRO.transformer.num_classes - 1


def variant(**options: object) -> HitConfig:
    return replace(MICRO, transformer=replace(MICRO.transformer, **options))  # type: ignore[arg-type]


VARIANTS = {
    "default": MICRO,
    "full grid": variant(ar_grid="full"),
    "no l2 norm": variant(attn_l2_norm=False),
    "injection, gates, bicubic": variant(
        prefix_injection=True, gate_init=0.5, position_resample="bicubic", position_grid=12
    ),
}


def inputs(seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """LR features, classes and input rows in float64."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, 6, 8, 8, generator=generator, dtype=torch.float64)
    rows = torch.randn(batch, TOKENS - LENGTHS[0], 6, generator=generator, dtype=torch.float64)
    return features, torch.arange(batch) % 2, rows


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_a_scale_sees_itself_and_earlier_scales_only(config: HitConfig) -> None:
    transformer = micro_model(config, torch.float64).transformer
    features, classes, rows = inputs()
    before = transformer(features, classes, rows).split(LENGTHS, dim=1)
    assert before[0].dtype == torch.float32 and before[-1].shape == (2, 64, 48)
    for step in range(1, len(SCALES)):
        changed = list(rows.split(LENGTHS[1:], dim=1))
        changed[step - 1] = changed[step - 1].clone()
        changed[step - 1][:, -1] += 1.0
        after = transformer(features, classes, torch.cat(changed, 1)).split(LENGTHS, dim=1)
        for other in range(len(SCALES)):
            if other < step:
                assert torch.equal(before[other], after[other]), (step, other)
            else:
                # Within a scale attention looks both ways: its last token reaches all of it.
                assert ((before[other] - after[other]).abs().amax(-1) > 0).all(), (step, other)


@pytest.mark.parametrize("changed", ["features", "class"])
@torch.no_grad()
def test_all_tokens_see_the_prefix_and_the_class(changed: str) -> None:
    transformer = micro_model(dtype=torch.float64).transformer
    features, classes, rows = inputs()
    before = transformer(features, classes, rows)
    if changed == "features":
        features[:, :, 3, 5] += 1.0
    else:
        classes = 1 - classes
    after = transformer(features, classes, rows)
    assert ((before - after).abs().amax(-1) > 0).all()


@torch.no_grad()
def test_samples_of_a_batch_do_not_meet() -> None:
    transformer = micro_model(dtype=torch.float64).transformer
    features, classes, rows = inputs()
    together = transformer(features, classes, rows)
    alone = transformer(features[1:], classes[1:], rows[1:])
    torch.testing.assert_close(together[1:], alone, **TOLERANCES["float32_reordered"]._asdict())


@torch.no_grad()
def test_logits_are_the_head_of_the_hidden_rows() -> None:
    for dtype in (torch.float64, torch.float32):
        transformer = micro_model(dtype=dtype).transformer
        features, classes, rows = inputs()
        hidden = transformer.hidden(features, classes, rows)
        assert hidden.dtype == dtype and hidden.shape == (2, TOKENS, 16)
        assert torch.equal(transformer(features, classes, rows), transformer.head(hidden).float())


@torch.no_grad()
def test_nothing_is_random_in_training() -> None:
    transformer = micro_model(variant(class_dropout=1.0, drop_path=0.9), torch.float64).transformer
    before = transformer(*inputs())
    state = torch.random.get_rng_state()
    assert torch.equal(transformer.train()(*inputs()), before)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("branch", [0, 1])
@torch.no_grad()
def test_a_factor_of_keep_is_that_of_one_gate_of_one_image(branch: int) -> None:
    transformer = micro_model(dtype=torch.float64).transformer
    features, classes, rows = inputs()
    keep = torch.ones(2, 2, 2, dtype=torch.float64)
    plain = transformer.hidden(features, classes, rows)
    assert torch.equal(transformer.hidden(features, classes, rows, keep=keep), plain)

    keep[1, branch, 0] = 2.0
    found = transformer.hidden(features, classes, rows, keep=keep)
    assert torch.equal(found[1], plain[1])
    width = MICRO.transformer.width
    for parameter in transformer.blocks[1].ada_lin[1].parameters():
        parameter[branch * width : (branch + 1) * width] *= 2.0
    expected = transformer.hidden(features, classes, rows)
    torch.testing.assert_close(found[0], expected[0], **TOLERANCES["float64_reordered"]._asdict())


@torch.no_grad()
def test_blocks_without_their_branches_are_none() -> None:
    transformer = micro_model(dtype=torch.float64).transformer
    features, classes, rows = inputs()
    dropped = transformer.hidden(features, classes, rows, keep=torch.zeros(2, 2, 2))
    transformer.blocks = transformer.blocks[:0]
    condition = transformer.class_emb(classes)
    parts = [transformer.first_block(features, condition)[:, transformer.prefix_length :]]
    for step, part in enumerate(rows.split(LENGTHS[1:], dim=1), start=1):
        parts.append(transformer.scale_block(part, features, step))
    assert torch.equal(dropped, transformer.head_nm(torch.cat(parts, 1), condition))


def test_initial_weights() -> None:
    """VAR's scheme: gates nearly shut unless the configuration opens them, a classifier that starts flat."""
    shut, opened = HitTransformer(MICRO), HitTransformer(variant(gate_init=0.5))
    width = MICRO.transformer.width
    for transformer, bias in ((shut, 0.0), (opened, 0.5)):
        for block in transformer.blocks:
            linear = block.ada_lin[1]
            assert torch.equal(linear.bias[: 2 * width], torch.full((2 * width,), bias))
            assert not linear.bias[2 * width :].any()
            assert linear.weight[: 2 * width].abs().max() < 2e-3 < linear.weight[2 * width :].abs().max()
        assert transformer.head.weight.abs().max() < 0.02
        assert not transformer.head.bias.any()


def test_gradients_reach_every_parameter() -> None:
    transformer = micro_model(variant(prefix_injection=True)).transformer.train()
    features, classes, rows = inputs()
    transformer(features.float(), classes, rows.float()).square().mean().backward()
    for name, parameter in transformer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
