"""Training from VAR's weights as the README says: the paper's recipes, two steps, at reduced width."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hitsr_fast.cli import main
from hitsr_fast.models import HitVar
from hitsr_fast.models.hit_var.config import HitConfig, TokenizerConfig, TransformerConfig
from hitsr_fast.train.recipes import load_recipe
from tests.models.public_checkpoints import random_state, var_state, vqvae_shapes
from tests.train.photos import write_photos

CODES, CHANNELS, WIDTH = 64, 32, 32
# VAR-d16 and its VQVAE, narrow and at 64 pixels.
NARROW = HitConfig(
    name="narrow",
    tokenizer=TokenizerConfig(
        codebook_size=CODES, channels=CHANNELS, scales=(1, 2, 3, 4), targets=(0.25, 0.5, 1.0)
    ),
    transformer=TransformerConfig(depth=2, width=WIDTH, heads=2, position_grid=8),
)
FIRST = {"hit-d16": "tokenize", "hit-d16-v2": "decoders"}


@pytest.mark.parametrize("name", FIRST)
def test_the_papers_recipe_starts_from_public_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path / "empty"))  # an evaluation without LPIPS takes less
    write_photos(tmp_path / "photos")
    (tmp_path / "narrow.json").write_text(NARROW.to_json())
    vqvae = smaller(random_state(vqvae_shapes(channels=CHANNELS, codebook_size=CODES)))
    var = smaller(var_state(depth=2, width=WIDTH, heads=2, codebook_size=CODES))
    torch.save(vqvae, "vae_ch160v4096z32.pth")
    torch.save(var, "var_d16.pth")

    words = f"train {name} photos run --device cpu --model narrow.json --schedule.steps 2 --batch 2"
    words += " --parallel.micro-batch 1 --data.workers 0 --data.holdout held --task.loss.vgg 0"
    words += " --precision.dtype float32"
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 0

    phases = [phase.name for phase in load_recipe(name).phases]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines if line["kind"] == "step" and line["step"] == 2] == phases
    model = HitVar.from_pretrained(tmp_path / "run" / "model").float().state_dict()
    key = "encoder.conv_in.weight"
    assert torch.equal(model[f"tokenizer.{key}"], vqvae[key].half().float()), "the encoder is frozen"
    # Two steps from where it started, and not anywhere else.
    for ours, theirs in (
        ("transformer.blocks.0.ffn.fc1.weight", var["blocks.0.ffn.fc1.weight"]),
        ("tokenizer.quantize.codebook", vqvae["quantize.embedding.weight"]),
        ("tokenizer.decoders.1.conv_in.weight", vqvae["decoder.conv_in.weight"]),
    ):
        moved = (model[ours] - theirs).abs().max()
        assert 0 < moved < 0.02, ours


def smaller(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights a tenth as large, and VAR's buffer of levels as it is."""
    return {key: 0.1 * value if value.is_floating_point() else value for key, value in state.items()}
