"""The shelf: a folder with weights becomes a model of its family, by `model_type` alone."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from hitsr_fast.models import HitVar, Model, ModelConfig, base, packaged_models, register
from tests.models.micro import MICRO, micro_model


@dataclass(frozen=True)
class GainConfig(ModelConfig):
    model_type: Literal["gain"] = "gain"
    channels: int = 3


class Gain(Model):
    config_class = GainConfig

    def __init__(self, config: GainConfig) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(config.channels))


def test_each_family_comes_back_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_FAMILIES", dict(base._FAMILIES))
    register(Gain)
    micro_model().save_pretrained(tmp_path / "hit")
    gain = Gain(GainConfig(channels=2)).bfloat16()
    gain.save_pretrained(tmp_path / "gain")
    assert isinstance(Model.from_pretrained(tmp_path / "hit"), HitVar)
    found = Model.from_pretrained(tmp_path / "gain")
    assert isinstance(found, Gain) and found.config == gain.config
    assert found.weight.dtype == torch.bfloat16 and not found.training
    with pytest.raises(ValueError, match="gain: expected a HitVar, found a Gain"):
        HitVar.from_pretrained(tmp_path / "gain")


def test_a_config_without_a_type_is_a_hit_var(tmp_path: Path) -> None:
    micro_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("model_type") == "hit_var"
    path.write_text(json.dumps(values))
    assert isinstance(Model.from_pretrained(tmp_path), HitVar)
    path.write_text(json.dumps(values | {"model_type": "hit"}))
    with pytest.raises(ValueError, match=r"config\.json: model_type: expected .*hit_var.*, found 'hit'"):
        Model.from_pretrained(tmp_path)


def test_packaged_models_are_found_by_name() -> None:
    assert packaged_models() == ["hit-tiny"]
    model = Model.from_pretrained("hit-tiny")
    assert model.config.name == "hit-tiny"
    assert {weight.dtype for weight in model.parameters()} == {torch.float16}


@torch.no_grad()
def test_forward_is_teacher_forcing_on_the_features_of_the_tiles() -> None:
    model = micro_model()
    lr, classes = torch.rand(2, 3, 8, 8) * 2 - 1, torch.tensor([0, 1])
    drawn, _ = model.sample(model.lr_features(lr), classes)
    logits = model(lr, classes, drawn)
    assert logits.shape == (2, MICRO.tokenizer.pyramid.num_tokens, MICRO.tokenizer.codebook_size)
    assert torch.equal(logits.argmax(-1), drawn)  # greedy tokens, fed back, are the likeliest again


@torch.no_grad()
def test_the_tokenizer_gives_an_image_for_each_factor() -> None:
    tokenizer, image = micro_model().tokenizer, torch.rand(1, 3, 32, 32) * 2 - 1
    images = tokenizer(image)
    assert {factor: tuple(x.shape) for factor, x in images.items()} == {
        factor: (1, 3, 8 * factor, 8 * factor) for factor in (1, 2, 4)
    }
    assert torch.equal(images[2], tokenizer.decode_indices(tokenizer.tokenize(image).indices, [1])[0])


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("checkpoints", "init_from_var load_vqvae"),
        ("config", "HIT_D16 HIT_TINY PRESETS HitConfig TokenizerConfig TransformerConfig"),
        ("hit_upscaler", "HitUpscaler"),
        ("hit_var", "HIT_D16 HitConfig HitTokenizer HitTransformer HitVar init_from_var load_vqvae"),
    ],
)
def test_former_import_paths_work_first_of_all_imports(module: str, names: str) -> None:
    code = f"from hitsr_fast.models.{module} import {', '.join(names.split())}"
    subprocess.run([sys.executable, "-c", code], check=True)
