"""The transformer: who sees whom, and what is random in training. Sampling: test_hit_sampler.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hitsr_fast.models.hit_var.config import HitConfig
from hitsr_fast.models.hit_var.transformer import AdaLNBlock, HitTransformer
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
def test_class_dropout_in_training_only() -> None:
    model = micro_model(variant(class_dropout=1.0), torch.float64)
    transformer = model.transformer
    features, classes, rows = inputs()
    named = transformer(features, classes, rows)
    free = transformer(features, torch.full_like(classes, CLASS_FREE), rows)
    assert not torch.equal(named, free)
    transformer.train()
    assert torch.equal(transformer(features, classes, rows), free)
    transformer.eval()
    assert torch.equal(transformer(features, classes, rows), named)


@torch.no_grad()
def test_class_dropout_has_its_share() -> None:
    transformer = micro_model(variant(class_dropout=0.25)).transformer.train()
    seen: list[Tensor] = []
    transformer.class_emb.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    features, _, rows = inputs(batch=100)
    for _ in range(20):
        transformer(features.float(), torch.zeros(100, dtype=torch.int64), rows.float())
    classes = torch.cat(seen)
    assert set(classes.tolist()) == {0, CLASS_FREE}
    share = (classes == CLASS_FREE).float().mean()
    torch.testing.assert_close(share, torch.tensor(0.25), **TOLERANCES["share_of_2000"]._asdict())


@torch.no_grad()
def test_stochastic_depth_in_training_only() -> None:
    block = AdaLNBlock(16, 2, 4.0, True, drop_path=0.5)
    branch = torch.ones(2000, 1, 1)
    assert torch.equal(block.eval()._dropped(branch), branch)
    dropped = block.train()._dropped(branch)
    assert set(dropped.flatten().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(
        (dropped > 0).float().mean(), torch.tensor(0.5), **TOLERANCES["share_of_2000"]._asdict()
    )


def test_stochastic_depth_rises_linearly() -> None:
    deep = HitTransformer(variant(depth=5, drop_path=0.2))
    found = [block.drop_path for block in deep.blocks]
    assert found == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


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
