"""Checkpoints as trainers write them: unwrapped and said so, or refused in few words."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hitsr_fast.models import CheckpointError, Model, read_state
from hitsr_fast.models.base import load_state
from hitsr_fast.models.state_dicts import check_state, unwrap
from tests.models.micro import micro_model


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1)))


OWN = network().state_dict()
OTHER = network(1).state_dict()


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    ("state", "wrapping"),
    [
        (OWN, ""),
        ({**OWN, "epoch": 3}, ""),
        ({"model": OWN, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "epoch": 1}, "model"),
        ({"trainer": {"var_wo_ddp": OWN, "vae_local": {"a": torch.zeros(1)}}}, "trainer.var_wo_ddp"),
        (prefixed("module.", OWN), "module"),
        ({"state_dict": prefixed("module.", OWN)}, "state_dict.module"),
        (prefixed("_orig_mod.", OWN), "_orig_mod"),
        (prefixed("module._orig_mod.", OWN), "module._orig_mod"),
        ({key.replace("1.", "1._orig_mod."): value for key, value in OWN.items()}, "_orig_mod"),
        ({"model": OTHER, "model_ema": OWN}, "model_ema"),
        ({"params_ema": OWN, "params": OTHER}, "params_ema"),
        (AveragedModel(network()).state_dict(), "module"),
        ({"net": {**OWN, "0.weight": torch.zeros(3, 2)}, "whole": OWN} | {"net": {}}, "whole"),
    ],
)
def test_weights_are_found_wherever_they_lie(state: dict[str, Any], wrapping: str) -> None:
    model = network(2)
    said = load_state(model, state, "run/ckpt.pth")
    assert said == (f"run/ckpt.pth: the weights under {wrapping!r}" if wrapping else "")
    for key, value in model.state_dict().items():
        assert torch.equal(value, OWN[key]), key


def test_a_compiled_and_averaged_model() -> None:
    model = torch.compile(network(), backend="eager")
    own, wrapping = unwrap(AveragedModel(model).state_dict(), OWN)
    assert set(own) == set(OWN) and wrapping == "module._orig_mod"


def test_what_has_most_of_the_keys_is_taken() -> None:
    own, wrapping = unwrap({"ema": {"0.weight": OTHER["0.weight"]}, "model": OWN}, OWN)
    assert wrapping == "model" and set(own) == set(OWN)


def test_an_error_shows_five_keys_of_many() -> None:
    expected = {f"blocks.{i}.{'long_name.' * 20}weight": (2, 3) for i in range(100)}
    source = "folder/" * 100 + "ckpt.pth"
    some = {key: torch.zeros(2, 3) for key in list(expected)[:40]}
    bent = {key: torch.zeros(3, 2) for key in list(expected)[40:60]}
    odd = {f"other.{key}": torch.zeros(1) for key in expected}
    for state in (some, bent, some | odd, some | bent | odd, odd, {}):
        with pytest.raises(CheckpointError) as caught:
            check_state(expected, state, source, "one more word on what to do about it, of some length")
        message = str(caught.value)
        assert len(message) < 600, message
        assert message.count("weight") <= 5 and message.count("'") <= 10, message
        assert "ckpt.pth does not fit the model; " in message and message.endswith("of some length")
    with pytest.raises(CheckpointError, match=r"missing keys: \[.*\] and 55 more;"):
        check_state(expected, some, source, "hint")


def test_from_pretrained_unwraps_with_one_warning(tmp_path: Path) -> None:
    model = micro_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({f"module.{key}": value for key, value in model.state_dict().items()}, path)
    with pytest.warns(UserWarning, match="model.safetensors: the weights under 'module'$"):
        loaded = Model.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_files_are_read(tmp_path: Path) -> None:
    save_file(dict(OWN), tmp_path / "model.safetensors")
    torch.save({"model": OWN, "args": argparse.Namespace(lr=1.0)}, tmp_path / "ckpt.pth")
    for place, inner in (("", None), ("model.safetensors", None), ("ckpt.pth", "model")):
        state = read_state(tmp_path / place)
        found = state if inner is None else state[inner]
        assert all(torch.equal(found[key], OWN[key]) for key in OWN)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harmed"),))


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"a\.pth: no such file"):
        read_state("a.pth")
    torch.save({"model": OWN, "extra": Harmful()}, "a.pth")
    with pytest.raises(
        CheckpointError, match=r"^a\.pth: expected tensors and plain values, found Python obj"
    ):
        read_state("a.pth")
    assert not Path("harmed").exists()
    torch.save([1, 2], "a.pth")
    with pytest.raises(CheckpointError, match=r"^a\.pth: expected a state dict, found list$"):
        read_state("a.pth")
    for name in ("a.pth", "a.safetensors"):
        Path(name).write_bytes(b"PK\x03\x04 cut short")
        with pytest.raises(CheckpointError, match=rf"^{name}: expected a checkpoint, found a broken file$"):
            read_state(name)
