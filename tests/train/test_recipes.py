"""The recipes that come with the package: they load, and their values are those of their papers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hitsr_fast.losses.config import ReconstructionLossConfig
from hitsr_fast.models.hit_var import PRESETS
from hitsr_fast.train.config import NextScaleConfig, Phase, Recipe, TokenizeConfig
from hitsr_fast.train.recipes import load_recipe, recipe_names

# Images of DIV2K, Flickr2K, DIV8K and OST, and the part of FFHQ that HIT-VAR takes (4.1).
IMAGES = 800 + 2650 + 1500 + 10324 + 10000
WHOLE = ReconstructionLossConfig(
    pixel="l2", alex=0.0, vgg=5.0, vgg_share=1.0, crop=0, jitter=0, targets="sum"
)


def phases(name: str) -> dict[str, Phase]:
    return {phase.name: phase for phase in load_recipe(name).phases}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_comes_back_from_its_json(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.model in PRESETS
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert all(phase.schedule.steps for phase in recipe.phases)


def test_the_recipes_are_those_that_are_documented() -> None:
    assert recipe_names() == ["hit-d16", "hit-d16-tokenizer", "hit-d16-v2", "hit-tiny"]


def test_hit_tiny_is_four_phases() -> None:
    found = phases("hit-tiny")
    assert [(name, phase.batch, phase.schedule.steps, phase.optim.lr) for name, phase in found.items()] == [
        ("autoencode", 16, 310, 7e-4),
        ("tokenize", 16, 340, 5e-4),
        ("next_scale", 8, 2400, 2e-3),
        ("decode", 12, 1200, 4e-4),
    ]
    assert [phase.optim.weight_decay for phase in found.values()] == [0.01, 0.01, 0.005, 0.01]
    assert [phase.optim.muon_lr for phase in found.values()] == [0.0, 0.0, 1e-2, 0.0]
    assert {phase.optim.ema for phase in found.values()} == {0.995}
    assert {phase.optim.clip for phase in found.values()} == {1.0}
    schedules = {(p.schedule.warmup, p.schedule.decay, p.schedule.final_lr) for p in found.values()}
    assert schedules == {(0.02, "cosine", 0.02)}
    assert found["tokenize"].optim.quantizer_lr == 0.0
    task: Any = found["next_scale"].task
    assert (task.scale_balance, task.mistakes, task.mistake_codes) == (0.75, 0.3, 64)
    assert (task.preference, task.class_dropout, task.head_from_codebook) == (0.0, 0.1, True)
    task = found["tokenize"].task
    assert (task.codebook_images, task.codebook_weight, task.continuous_prob) == (2048, 0.5, 0.25)
    task = found["autoencode"].task
    assert (task.lr_share, task.latent_noise) == (0.25, 0.3)
    task = found["decode"].task
    assert (task.sampled, task.top_k, task.colour_fixed) == (0.9, 1, 0.5)
    losses = [asdict(phase.task)["loss"] for name, phase in found.items() if name != "next_scale"]
    assert losses == [asdict(ReconstructionLossConfig())] * 3


def test_hit_d16_has_the_values_of_the_paper() -> None:
    """Arxiv 2506.04990, section 4.1; what it leaves open is VAR's (2404.02905)."""
    found = phases("hit-d16")
    tokenize, next_scale = found["tokenize"], found["next_scale"]
    assert (tokenize.batch, tokenize.schedule.steps) == (384, 25_000)
    assert (tokenize.optim.lr, tokenize.optim.weight_decay) == (2.5e-4, 0.05)
    assert tokenize.optim.quantizer_lr is None, "the vocabulary is trained"
    task = tokenize.task
    assert isinstance(task, TokenizeConfig)
    assert (task.train, task.hierarchical, task.continuous_prob) == ("quantizer and decoders", True, 0.5)
    assert (task.codebook_images, task.gan_weight) == (0, 0.0)
    assert task.loss == WHOLE

    assert (next_scale.batch, next_scale.optim.lr, next_scale.optim.weight_decay) == (384, 1e-3, 0.005)
    assert next_scale.optim.betas == (0.9, 0.95)
    assert (next_scale.optim.clip, next_scale.optim.ema, next_scale.optim.muon_lr) == (2.0, 0.0, 0.0)
    assert next_scale.schedule.steps == -(-200 * IMAGES // 384)
    schedule = next_scale.schedule
    assert (schedule.warmup, schedule.decay, schedule.final_lr) == (0.02, "lin0", 0.1)
    head = next_scale.task
    assert isinstance(head, NextScaleConfig)
    assert (head.preference, head.preference_beta, head.preference_reduction) == (1.0, 1.0, "mean")
    assert (head.preference_classes, head.class_dropout) == (None, 0.1)
    assert (head.scale_balance, head.mistakes, head.head_from_codebook) == (0.0, 0.0, False)
    assert head.drop_path == pytest.approx(0.1 * 16 / 24, abs=1e-4)
    assert load_recipe("hit-d16").data.clean_prob == 0.25


def test_hit_d16_v2_is_the_later_version() -> None:
    """Arxiv 2605.14891: beta 0.2, decoders and vocabulary apart, eleven scales."""
    first, later = phases("hit-d16"), phases("hit-d16-v2")
    assert list(later) == ["decoders", "vocabulary", "next_scale"]
    trained = [asdict(later[name].task)["train"] for name in ("decoders", "vocabulary")]
    assert trained == ["decoders", "quantizer"]
    for name in ("decoders", "vocabulary"):
        assert (later[name].batch, later[name].optim.lr) == (384, 2.5e-4)
    assert asdict(later["decoders"].task)["loss"] == asdict(WHOLE)
    assert asdict(first["next_scale"].task) | {"preference_beta": 0.2} == asdict(later["next_scale"].task)
    assert later["next_scale"].optim == first["next_scale"].optim
    config = PRESETS[load_recipe("hit-d16-v2").model].tokenizer
    assert len(config.scales) == 11
    assert set(config.scales) > set(PRESETS["hit-d16"].tokenizer.scales)


def test_the_paper_recipes_start_from_public_weights() -> None:
    for name in ("hit-d16", "hit-d16-v2"):
        found = list(phases(name).values())
        assert found[0].init_from == ("public:vae_ch160v4096z32.pth",)
        assert found[-1].init_from[-1] == "public:var_d16.pth"


def test_the_tokenizer_recipe_starts_from_nothing() -> None:
    found = phases("hit-d16-tokenizer")
    assert found["autoencode"].init_from == ()
    task = found["tokenize"].task
    assert isinstance(task, TokenizeConfig)
    assert (task.train, task.commitment) == ("all", 0.25)
    assert task.gan_weight > 0 and 0 < task.gan_from < found["tokenize"].schedule.steps
    assert task.codebook_images > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "Expecting value"),
        ('{"phases": [{"optim": {"rate": 1}}]}', r"config\.phases\[0\]\.optim: unknown keys \['rate'\]"),
        ('{"seed": -1}', "seed: expected at least 0, found -1"),
        ('{"phases": [{"name": "model"}]}', "name: expected a word .* other than model and tensorboard"),
    ],
)
def test_a_broken_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ValueError, match=rf"mine\.json: .*{message}"):
        load_recipe(tmp_path / "mine.json")


def test_a_file_of_ones_own_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({"name": "mine", "phases": [{"name": "a"}]}))
    assert load_recipe(tmp_path / "mine.json") == Recipe(name="mine", phases=(Phase(name="a"),))


def test_unknown_recipes_are_named(tmp_path: Path) -> None:
    known = "hit-d16, hit-d16-tokenizer, hit-d16-v2, hit-tiny"
    with pytest.raises(
        ValueError, match=f"recipe: expected one of {known}, or a JSON file, found 'hit-huge'"
    ):
        load_recipe("hit-huge")
    with pytest.raises(ValueError, match="found the folder"):
        load_recipe(tmp_path)
