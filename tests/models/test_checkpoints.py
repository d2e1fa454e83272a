"""Published weights go where they belong, or nowhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.models import CheckpointError, HitTokenizer, HitTransformer, init_from_var, load_vqvae
from hitsr_fast.models.base import load_state
from hitsr_fast.models.hit_var.config import HIT_D16, HitConfig, TokenizerConfig, TransformerConfig
from tests.models.public_checkpoints import (
    meta_state,
    random_state,
    var_shapes,
    vqvae_shapes,
)

# The published structure at a fifth of its width.
NARROW = TokenizerConfig(channels=32, codebook_size=64)
NARROW_BODY = TransformerConfig(depth=2, width=32, heads=2, position_grid=20)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_published_vqvae_fits_the_default_tokenizer() -> None:
    with torch.device("meta"):
        tokenizer = HitTokenizer(HIT_D16.tokenizer)
    load_vqvae(tokenizer, meta_state(vqvae_shapes()))


def test_published_var_d16_fits_the_default_transformer() -> None:
    with torch.device("meta"):
        transformer = HitTransformer(HIT_D16)
    init_from_var(transformer, meta_state(var_shapes()))


@pytest.mark.parametrize("phi", [4, 1, 0])
def test_vqvae_lands_where_it_belongs(phi: Literal[4, 1, 0]) -> None:
    config = replace(NARROW, num_phi={4: 4, 1: 1, 0: 10}[phi])
    tokenizer = HitTokenizer(config)
    state = random_state(vqvae_shapes(channels=32, codebook_size=64, phi=phi))
    load_vqvae(tokenizer, state)
    loaded = tokenizer.state_dict()
    for key, value in state.items():
        if key.startswith(("encoder.", "quant_conv.")):
            assert torch.equal(loaded.pop(key), value), key
        elif key.startswith("decoder."):
            for target in range(3):
                assert torch.equal(loaded.pop(f"decoders.{target}.{key.removeprefix('decoder.')}"), value), (
                    key
                )
        elif key.startswith("post_quant_conv."):
            for target in range(3):
                assert torch.equal(loaded.pop(f"decoders.{target}.{key}"), value), key
    assert torch.equal(loaded.pop("quantize.codebook"), state["quantize.embedding.weight"])
    names = {4: "qresi_ls.{}", 1: "qresi", 0: "{}"}[phi]
    for part in ("weight", "bias"):
        bank = loaded.pop(f"quantize.phi_{part}")
        for i in range(config.num_phi):
            assert torch.equal(bank[i], state[f"quantize.quant_resi.{names.format(i)}.{part}"])
    assert not loaded, "every weight was checked"


def test_one_published_phi_fills_a_bank() -> None:
    tokenizer = HitTokenizer(NARROW)
    state = random_state(vqvae_shapes(channels=32, codebook_size=64, phi=1))
    load_vqvae(tokenizer, state)
    for weight in tokenizer.quantize.phi_weight:
        assert torch.equal(weight, state["quantize.quant_resi.qresi.weight"])


def test_vqvae_errors_name_the_keys_and_change_nothing() -> None:
    tokenizer = HitTokenizer(NARROW)
    before = snapshot(tokenizer)
    state = random_state(vqvae_shapes(channels=32, codebook_size=64))
    del state["decoder.up.4.attn.2.proj_out.bias"]
    state["decoder.wings"] = torch.zeros(1)
    state["quantize.embedding.weight"] = torch.zeros(63, 32)
    with pytest.raises(CheckpointError) as caught:
        load_vqvae(tokenizer, state, "vae.pth")
    assert str(caught.value) == (
        "vae.pth does not fit the model; "
        "missing keys: ['decoder.up.4.attn.2.proj_out.bias']; "
        "unexpected keys: ['decoder.wings']; "
        "mis-shaped keys: ['quantize.embedding.weight: expected (64, 32), found (63, 32)']"
    )
    assert unchanged(tokenizer, before)


def test_a_phi_a_scale_does_not_fit_a_shared_bank() -> None:
    state = random_state(vqvae_shapes(channels=32, codebook_size=64, phi=0))
    with pytest.raises(CheckpointError, match=r"unexpected keys: \['quantize\.quant_resi\.4\.bias'"):
        load_vqvae(HitTokenizer(NARROW), state)


def narrow_transformer() -> HitTransformer:
    return HitTransformer(HitConfig(tokenizer=replace(NARROW, code_dim=32), transformer=NARROW_BODY))


def narrow_var() -> dict[str, Tensor]:
    return random_state(var_shapes(depth=2, width=32, heads=2, codebook_size=64))


def test_var_lands_where_it_belongs() -> None:
    transformer, state = narrow_transformer(), narrow_var()
    init_from_var(transformer, state)
    loaded = transformer.state_dict()
    for key, value in state.items():
        if key.startswith(("blocks.", "head", "word_embed.")) and not key.endswith("zero_k_bias"):
            assert torch.equal(loaded.pop(key), value), key
    for part in ("weight", "bias"):
        assert torch.equal(loaded.pop(f"prefix_embed.{part}"), state[f"word_embed.{part}"])

    classes = loaded.pop("class_emb.weight")
    mean = state["class_emb.weight"][:1000].mean(0)
    assert torch.equal(classes, torch.stack([mean, mean, state["class_emb.weight"][1000]]))

    levels = loaded.pop("lvl_embed.weight")
    assert torch.equal(levels[1:], state["lvl_embed.weight"])
    assert torch.equal(levels[0], state["lvl_embed.weight"][9])

    start = loaded.pop("pos_start")
    assert start.shape == (1, 16, 32)
    assert torch.equal(start, state["pos_start"].expand(1, 16, 32))

    grid = loaded.pop("position_grid")
    last = state["pos_1LC"][0, 680 - 256 :].T.reshape(1, 32, 16, 16)
    assert torch.equal(grid, F.interpolate(last, (20, 20), mode="bicubic"))
    assert not loaded, "every weight was checked"


def test_var_errors_name_the_keys_and_change_nothing() -> None:
    transformer, state = narrow_transformer(), narrow_var()
    before = snapshot(transformer)
    del state["blocks.1.attn.q_bias"]
    state["blocks.2.attn.q_bias"] = torch.zeros(32)
    state["lvl_embed.weight"] = torch.zeros(14, 32)
    with pytest.raises(CheckpointError) as caught:
        init_from_var(transformer, state, "var.pth")
    message = str(caught.value)
    assert message.startswith("var.pth does not fit the model; ")
    assert "missing keys: ['blocks.1.attn.q_bias']" in message
    assert "unexpected keys: ['blocks.2.attn.q_bias']" in message
    assert "lvl_embed.weight: expected (10, 32), found (14, 32)" in message
    assert unchanged(transformer, before)


def test_unknown_position_table_changes_nothing() -> None:
    transformer, state = narrow_transformer(), narrow_var()
    before = snapshot(transformer)
    state["pos_1LC"] = torch.zeros(1, 679, 32)
    with pytest.raises(CheckpointError, match=r"pos_1LC: expected one of \[680, 2240, 9451\] .* found 679"):
        init_from_var(transformer, state)
    assert unchanged(transformer, before)


def test_own_state_is_loaded_whole_or_not_at_all() -> None:
    model = nn.Linear(2, 3)
    before = snapshot(model)
    with pytest.raises(
        CheckpointError, match=r"^here does not fit .* missing keys: \['bias'\].*weight: expected"
    ):
        load_state(model, {"weight": torch.zeros(2, 3)}, "here")
    assert unchanged(model, before)
    load_state(model, {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, "here")
    assert torch.equal(model(torch.ones(1, 2)), torch.full((1, 3), 3.0))
