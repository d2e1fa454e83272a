from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hitsr_fast.models.base import load_config
from hitsr_fast.models.hit_var.config import (
    HIT_D16,
    HIT_D16_11,
    HIT_TINY,
    PRESETS,
    HitConfig,
    TokenizerConfig,
    TransformerConfig,
)
from hitsr_fast.models.hit_var.tokenizer import quantizer_of
from tests.models.micro import MICRO


@pytest.mark.parametrize("config", [*PRESETS.values(), MICRO], ids=lambda config: config.name)
def test_json_round_trip(config: HitConfig) -> None:
    assert HitConfig.from_json(config.to_json()) == config


def test_presets_go_by_their_names() -> None:
    assert PRESETS == {"hit-d16": HIT_D16, "hit-d16-11": HIT_D16_11, "hit-tiny": HIT_TINY}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("wings",), 2, r"config: unknown keys \['wings'\]"),
        (("tokenizer", "wings"), 2, r"config\.tokenizer: unknown keys \['wings'\]"),
        (("transformer", "Depth"), 2, r"config\.transformer: unknown keys \['Depth'\]"),
        (("transformer",), 3, "config.transformer: expected an object, found int"),
        (("transformer", "depth"), "six", "depth: expected int, found 'six'"),
        (("transformer", "depth"), 0, "depth: expected at least 1, found 0"),
        (("transformer", "depth"), True, "depth: expected int, found True"),
        (("transformer", "ar_grid"), "ful", "ar_grid: expected .*'full'.*found 'ful'"),
        (("transformer", "position_resample"), "bilinear", "position_resample: expected"),
        (("transformer", "prefix_injection"), 1, "prefix_injection: expected bool, found 1"),
        (("transformer", "class_dropout"), 1.5, r"class_dropout: expected a value in \[0, 1\], found 1.5"),
        (("transformer", "heads"), 7, "width: expected a multiple of heads=7"),
        (("tokenizer", "phi_indexing"), "local", "phi_indexing: expected"),
        (("tokenizer", "resize_mode"), "lanczos", "resize_mode: expected"),
        (("tokenizer", "scales"), [4, 2, 8], "scales: expected ascending sides"),
        (("tokenizer", "scales"), [], "scales: expected ascending sides"),
        (("tokenizer", "scales"), [1.5, 8], "scales: expected .*found"),
        (("tokenizer", "scales"), 8, "scales: expected .*found 8"),
        (("tokenizer", "targets"), [0.5], "targets: expected ascending fractions that end at 1"),
        (("tokenizer", "targets"), [0.3, 1.0], "targets: 0.3 of the side 32"),
        (("tokenizer", "targets"), [float("inf"), 1.0], "targets: expected finite numbers"),
        (("tokenizer", "channels"), 33, "channels: expected a multiple of 32, found 33"),
        (("tokenizer", "channel_multipliers"), [], "channel_multipliers: expected at least one"),
        (
            ("tokenizer", "channel_multipliers"),
            [-1, 2],
            r"channel_multipliers: expected at least 1, found \(-1",
        ),
        (("transformer", "mlp_ratio"), float("nan"), "mlp_ratio: expected finite numbers, found nan"),
        (("transformer", "mlp_ratio"), -1, "mlp_ratio: expected at least 1 / width = 1 / 1024, found -1"),
        (
            ("transformer", "mlp_ratio"),
            1e-9,
            "mlp_ratio: expected at least 1 / width = 1 / 1024, found 1e-09",
        ),
        (("transformer", "mlp_ratio"), float("inf"), "mlp_ratio: expected finite numbers, found inf"),
        (("transformer", "gate_init"), float("inf"), "gate_init: expected finite numbers, found inf"),
        (("name",), 5, "name: expected str, found 5"),
        (("colour_fix_levels",), [5], r"colour_fix_levels: expected 3 numbers of at least 0, found \(5,\)"),
        (("colour_fix_levels",), [3, 4, -1], "colour_fix_levels: expected 3 numbers"),
    ],
)
def test_wrong_keys_and_values_are_errors(
    path: tuple[str, ...], value: object, message: str, tmp_path: Path
) -> None:
    values = json.loads(HIT_D16.to_json())
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        HitConfig.from_json(json.dumps(values))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        load_config(file)


def test_a_file_that_is_wrong_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text in ("{", '{"wings": 2}', "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json: "):
            load_config(path)


def test_a_whole_number_may_stand_for_a_share() -> None:
    assert TransformerConfig(drop_path=0).drop_path == 0
    tokenizer = TokenizerConfig(targets=(1,))
    assert tokenizer.target_sizes == (32,) and tokenizer.scale_factors == (4,)


def test_geometry_of_the_paper() -> None:
    tokenizer = HIT_D16.tokenizer
    assert (tokenizer.stride, tokenizer.latent_size, tokenizer.image_size) == (16, 32, 512)
    assert tokenizer.target_sizes == (8, 16, 32)
    assert tokenizer.pyramid.steps == (3, 6, 10)
    assert tokenizer.pyramid.num_tokens == 3452


def test_geometry_of_hit_tiny() -> None:
    tokenizer = HIT_TINY.tokenizer
    assert (tokenizer.stride, tokenizer.latent_size, tokenizer.image_size) == (8, 16, 128)
    assert tokenizer.target_sizes == (4, 8, 16)
    assert tokenizer.pyramid.steps == (3, 6, 10)
    assert tokenizer.pyramid.num_tokens == 863


# A bank of the default size, over little else.
SMALL = TokenizerConfig(code_dim=2, codebook_size=4, num_phi=4)


def test_global_phi_index_is_the_same_at_each_target() -> None:
    quantizer = quantizer_of(SMALL)
    table = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert list(quantizer.bank(2).phi_index) == table
    assert [list(quantizer.bank(target).phi_index) for target in (0, 1)] == [table[:3], table[:6]]


def test_phi_index_per_target_starts_anew() -> None:
    quantizer = quantizer_of(replace(SMALL, phi_indexing="per_target"))
    assert list(quantizer.bank(0).phi_index) == [0, 2, 3]
    assert list(quantizer.bank(1).phi_index) == [0, 0, 1, 2, 3, 3]
    assert list(quantizer.bank(2).phi_index) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_one_phi_a_step() -> None:
    assert list(quantizer_of(replace(SMALL, num_phi=10)).bank(2).phi_index) == list(range(10))
