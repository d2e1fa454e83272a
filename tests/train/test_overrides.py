"""Values of a recipe by dotted names: one phase or all, of the annotated type, mistakes in one line."""

from __future__ import annotations

from typing import Any

import pytest

from hitsr_fast.train.config import Recipe
from hitsr_fast.train.overrides import names, override
from hitsr_fast.train.recipes import load_recipe

TINY = load_recipe("hit-tiny")


def value(recipe: Recipe, path: str) -> Any:
    head, _, rest = path.partition(".")
    by_name = {phase.name: phase for phase in recipe.phases}
    found: Any = by_name.get(head, recipe)
    for part in (rest if head in by_name else path).split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("words", "path", "expected"),
    [
        (["--seed", "3"], "seed", 3),
        (["--seed=3"], "seed", 3),
        (["--data.workers", "0"], "data.workers", 0),
        (["--data.clean-prob", "0.5"], "data.clean_prob", 0.5),
        (["--data.holdout", "a", "b"], "data.holdout", ("a", "b")),
        (["--data.holdout", "a", "--data.holdout", "none"], "data.holdout", None),
        (["--log.tensorboard"], "log.tensorboard", True),
        (["--log.tensorboard", "false"], "log.tensorboard", False),
        (["--tokenize.optim.lr", "1e-3"], "tokenize.optim.lr", 1e-3),
        (["--tokenize.optim.betas", "0.8", "0.9"], "tokenize.optim.betas", (0.8, 0.9)),
        (
            ["--tokenize.task.train", "quantizer and decoders"],
            "tokenize.task.train",
            "quantizer and decoders",
        ),
        (["--tokenize.task.loss.pixel", "l2"], "tokenize.task.loss.pixel", "l2"),
        (
            ["--tokenize.init-from", "public:a.pth", "file:b"],
            "tokenize.init_from",
            ("public:a.pth", "file:b"),
        ),
        (["--tokenize.init-from"], "tokenize.init_from", ()),
        (["--next-scale.schedule.steps", "7"], "next_scale.schedule.steps", 7),
        (["--next_scale.task.preference-classes", "0", "1"], "next_scale.task.preference_classes", (0, 1)),
        (["--next_scale.optim.quantizer-lr", "1"], "next_scale.optim.quantizer_lr", 1.0),
    ],
)
def test_a_value_goes_where_its_name_says_and_nowhere_else(
    words: list[str], path: str, expected: object
) -> None:
    changed = override(TINY, words)
    found = value(changed, path)
    assert found == expected and type(found) is type(expected)
    others = [name for name in names(TINY) if name.partition(".")[0] in {*vars(TINY), *_phases()}]
    differ = [name for name in others if value(TINY, name) != value(changed, name)]
    assert differ in ([path], [])


def _phases() -> list[str]:
    return [phase.name for phase in TINY.phases]


def test_a_name_without_a_phase_is_for_all_that_have_it() -> None:
    changed = override(TINY, ["--optim.lr", "0.1", "--task.loss.vgg", "0", "--task.mistakes", "0"])
    assert [phase.optim.lr for phase in changed.phases] == [0.1] * 4
    losses = [phase.task.loss for phase in changed.phases if hasattr(phase.task, "loss")]
    assert [loss.vgg for loss in losses] == [0.0] * 3
    assert value(changed, "next_scale.task.mistakes") == 0.0


def test_later_words_win() -> None:
    words = ["--optim.lr", "0.1", "--decode.optim.lr", "0.2"]
    assert [phase.optim.lr for phase in override(TINY, words).phases] == [0.1, 0.1, 0.1, 0.2]
    turned = [*words[2:], *words[:2]]
    assert [phase.optim.lr for phase in override(TINY, turned).phases] == [0.1] * 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.lr", "fast"], "autoencode.optim.lr: expected a number, found 'fast'"),
        (["--seed", "1.5"], "seed: expected a whole number, found '1.5'"),
        (["--seed", "-1"], "seed: expected at least 0, found -1"),
        (["--seed"], "seed: expected one value, found none"),
        (["--seed", "1", "2"], "seed: expected one value, found 1 2"),
        (["--decode.optim.lr", "-1"], "decode.optim.lr: expected a value above 0, found -1.0"),
        (["--decode.optim.betas", "1"], "decode.optim.betas: expected 2 values, found 1"),
        (
            ["--decode.parallel.strategy", "dp"],
            "decode.parallel.strategy: expected one of ddp, fsdp, found 'dp'",
        ),
        (
            ["--decode.parallel.compile", "yes"],
            "decode.parallel.compile: expected true or false, found 'yes'",
        ),
        (["--tokenize.task.loss.vgg", "-1"], "tokenize.task.loss.vgg: expected at least 0, found -1.0"),
        (
            ["--tokenize.init-from", "hub:a"],
            'tokenize.init_from: expected "phase:NAME", "file:PATH" or "public:PATH", found \'hub:a\'',
        ),
        (
            ["--tokenize.init-from", "phase:decode"],
            "tokenize.init_from: expected a phase before it, found 'phase:decode'",
        ),
        (
            ["--tokenizer.optim.lr", "1"],
            "--tokenizer.optim.lr: no such value; "
            "nearest are --tokenize.optim.lr, --autoencode.optim.lr, --decode.optim.lr",
        ),
        (
            ["--optim.weight-decai", "1"],
            "--optim.weight-decai: no such value; nearest are "
            "--optim.weight-decay, --decode.optim.weight-decay, --tokenize.optim.weight-decay",
        ),
        (["--next-scale.name", "x"], "--next-scale.name: no such value; nearest are --name"),
        (["--next-scale.task.kind", "x"], "--next-scale.task.kind: no such value"),
        (["run", "--seed", "1"], "expected --name before the value, found 'run'"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        override(TINY, words)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
