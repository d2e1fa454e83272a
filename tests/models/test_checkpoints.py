"""Published weights go where they belong, or nowhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.models import (
    CheckpointError,
    HitTokenizer,
    HitTransformer,
    HitVar,
    init_from_public,
    init_from_var,
    init_from_varsr,
    load_vqvae,
)
from hitsr_fast.models.base import load_state
from hitsr_fast.models.hit_var.config import HIT_D16, HitConfig, TokenizerConfig, TransformerConfig
from tests.models.public_checkpoints import (
    VAR_SCALES,
    meta_state,
    random_state,
    var_shapes,
    var_state,
    varsr_shapes,
    vqvae_shapes,
)
from tests.tolerances import TOLERANCES

VAR_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
VAR_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)

# The published structure at a fifth of its width.
NARROW = TokenizerConfig(channels=32, codebook_size=64)
NARROW_BODY = TransformerConfig(depth=2, width=32, heads=2, position_grid=20)
NARROW_SIZES = {"depth": 2, "width": 32, "heads": 2, "codebook_size": 64}


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


def narrow_transformer(**tokenizer: Any) -> HitTransformer:
    config = replace(NARROW, **tokenizer)
    levels = (3,) * len(config.targets)
    return HitTransformer(HitConfig(tokenizer=config, transformer=NARROW_BODY, colour_fix_levels=levels))


def narrow_var(scales: tuple[int, ...] = VAR_SCALES) -> dict[str, Tensor]:
    return var_state(scales, **NARROW_SIZES)


def narrow_varsr() -> dict[str, Tensor]:
    return random_state(varsr_shapes(**NARROW_SIZES))


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
    state["head.bias"] = torch.zeros(65)
    with pytest.raises(CheckpointError) as caught:
        init_from_var(transformer, state, "var.pth")
    message = str(caught.value)
    assert message.startswith("var.pth does not fit the model; ")
    assert "missing keys: ['blocks.1.attn.q_bias']" in message
    assert "unexpected keys: ['blocks.2.attn.q_bias']" in message
    assert "head.bias: expected (64,), found (65,)" in message
    assert unchanged(transformer, before)


def test_published_tables_are_known_by_their_length() -> None:
    """Without the buffer that says it: by the published sides of VAR's last scale."""
    for scales, side in ((VAR_SCALES, 16), (VAR_512, 32), (VAR_1024, 64)):
        transformer, state = narrow_transformer(), narrow_var(scales)
        del state["lvl_1L"]
        init_from_var(transformer, state)
        last = state["pos_1LC"][0, -side * side :].T.reshape(1, 32, side, side)
        assert torch.equal(transformer.position_grid, F.interpolate(last, (20, 20), mode="bicubic"))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda state: state.pop("lvl_1L"), r"lvl_1L beside it, or one of \[680, 2240, 9451\] .* found 14"),
        (
            lambda state: state.update(lvl_1L=torch.zeros(1, 14)),
            r"lvl_1L: expected the level, 0 to 2, of each",
        ),
        (lambda state: state.update(lvl_1L=torch.arange(3)), r"of the 14 rows of pos_1LC"),
    ],
)
def test_a_position_table_that_cannot_be_read_changes_nothing(
    broken: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    transformer, state = narrow_transformer(), narrow_var((1, 2, 3))
    before = snapshot(transformer)
    broken(state)
    with pytest.raises(CheckpointError, match=message):
        init_from_var(transformer, state)
    assert unchanged(transformer, before)


@pytest.mark.parametrize(
    ("scales", "targets", "var", "rows"),
    [
        (
            (4, 6, 8, 10, 14, 16, 20, 24, 28, 30, 32),
            (0.25, 1.0),
            VAR_SCALES,
            [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9],
        ),
        ((4, 8), (1.0,), (1, 2, 5), [0, 2]),
        ((1, 2, 5), (1.0,), (4, 8), [0, 0, 1]),  # the middle is as near to both: the coarser
        ((8,), (1.0,), (1, 2, 5), [2]),
        ((4, 8), (1.0,), (6,), [0, 0]),
    ],
)
def test_levels_go_to_scales_by_place(
    scales: tuple[int, ...], targets: tuple[float, ...], var: tuple[int, ...], rows: list[int]
) -> None:
    transformer, state = narrow_transformer(scales=scales, targets=targets), narrow_var(var)
    said = init_from_var(transformer, state, "var.pth")
    level = state["lvl_embed.weight"]
    assert torch.equal(transformer.lvl_embed.weight, torch.cat([level[-1:], level[rows]]))
    side = var[-1]
    last = state["pos_1LC"][0, -side * side :].T.reshape(1, 32, side, side)
    assert torch.equal(transformer.position_grid, F.interpolate(last, (20, 20), mode="bicubic"))
    assert said == f"var.pth: VAR, its levels of {len(var)} scales for the model's {len(scales)}"


def test_a_shared_ada_lin_is_given_to_each_block() -> None:
    transformer, state = narrow_transformer(), narrow_var()
    weight, bias = torch.randn(192, 32), torch.randn(192)
    rows = [torch.randn(1, 1, 6, 32) for _ in range(2)]
    for i, row in enumerate(rows):
        for part in ("weight", "bias"):
            del state[f"blocks.{i}.ada_lin.1.{part}"]
        state[f"blocks.{i}.ada_gss"] = row
    init_from_var(transformer, state | {"shared_ada_lin.1.weight": weight, "shared_ada_lin.1.bias": bias})
    condition = torch.randn(3, 32)
    for block, row in zip(transformer.blocks, rows, strict=True):
        expected = (F.silu(condition) @ weight.T + bias).view(3, 6, 32) + row[0]
        found = block.ada_lin(condition).view(3, 6, 32)
        torch.testing.assert_close(found, expected, **TOLERANCES["float32_reordered"]._asdict())


def test_varsr_lands_where_it_belongs() -> None:
    transformer, state = narrow_transformer(), narrow_varsr()
    said = init_from_varsr(transformer, state, "VARSR.pth")
    assert said == "VARSR.pth: VARSR, its levels of 10 scales; without its rotary positions, stem and refiner"
    loaded = transformer.state_dict()
    for key, value in state.items():
        if key.startswith(("blocks.", "head", "word_embed.")) and not key.endswith("zero_k_bias"):
            assert torch.equal(loaded.pop(key), value), key
    for part in ("weight", "bias"):
        assert torch.equal(loaded.pop(f"prefix_embed.{part}"), state[f"word_embed.{part}"])
    good = state["class_emb.weight"][:1]
    assert torch.equal(loaded.pop("class_emb.weight"), good.expand(3, -1))
    level = state["lvl_embed.weight"]
    assert torch.equal(loaded.pop("lvl_embed.weight"), torch.cat([level[:1], level]))
    assert torch.equal(loaded.pop("pos_start"), state["pos_start"][:, -1:].expand(1, 16, 32))
    prefix = state["pos_start"][0, :1024].T.reshape(1, 32, 32, 32)
    assert torch.equal(loaded.pop("position_grid"), F.interpolate(prefix, (20, 20), mode="bicubic"))
    assert not loaded, "every weight was checked"


def test_class_conditional_varsr_has_no_prefix() -> None:
    transformer, state = narrow_transformer(), narrow_varsr()
    state = {key: value for key, value in state.items() if not key.startswith("con_embedding.")}
    state |= {"pos_start": torch.randn(1, 1, 32), "class_emb.weight": torch.randn(31, 32)}
    state["lvl_embed.weight"] = level = torch.randn(12, 32)
    before = snapshot(transformer)
    init_from_varsr(transformer, state)
    classes = state["class_emb.weight"]
    mean = classes[:-1].mean(0)
    assert torch.equal(transformer.class_emb.weight, torch.stack([mean, mean, classes[-1]]))
    assert torch.equal(transformer.lvl_embed.weight[[0, 1, 10]], level[[11, 0, 11]])
    assert torch.equal(transformer.pos_start, state["pos_start"].expand(1, 16, 32))
    assert torch.equal(transformer.position_grid, before["position_grid"])


def test_decoders_for_the_lr_image_keep_their_start() -> None:
    tokenizer = HitTokenizer(replace(NARROW, decoder_lr=True))
    state = random_state(vqvae_shapes(channels=32, codebook_size=64))
    before = snapshot(tokenizer)
    load_vqvae(tokenizer, state)
    for key, value in tokenizer.state_dict().items():
        assert torch.equal(value, before[key]) == (".lr_" in key), key


def var_trainer() -> dict[str, Any]:
    """As VAR's trainer leaves it."""
    return {
        "epoch": 3,
        "iter": 0,
        "args": {"depth": 2},
        "trainer": {
            "var_wo_ddp": narrow_var(),
            "vae_local": random_state(vqvae_shapes(channels=32, codebook_size=64)),
            "var_opt": {
                "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1}]}
            },
        },
    }


def test_a_public_start_of_each_part_and_of_the_whole() -> None:
    config = HitConfig(tokenizer=NARROW, transformer=NARROW_BODY)
    state = var_trainer()
    whole, transformer, tokenizer = HitVar(config), HitTransformer(config), HitTokenizer(NARROW)
    vqvae = "ckpt.pth: a VQVAE; the weights under 'trainer.vae_local'"
    var = "ckpt.pth: VAR, its levels of 10 scales; the weights under 'trainer.var_wo_ddp'"
    assert init_from_public(whole, state, "ckpt.pth") == f"{vqvae}; {var}"
    assert init_from_public(transformer, state, "ckpt.pth") == var
    assert init_from_public(tokenizer, state, "ckpt.pth") == vqvae
    parts = {"transformer": transformer, "tokenizer": tokenizer}
    for name, part in parts.items():
        for key, value in part.state_dict().items():
            assert torch.equal(value, whole.state_dict()[f"{name}.{key}"]), key
    given = state["trainer"]["var_wo_ddp"]["head.weight"]
    assert torch.equal(whole.transformer.head.weight, given)


def test_public_varsr_is_not_taken_for_var() -> None:
    transformer = narrow_transformer()
    assert init_from_public(transformer, {"trainer": {"var_wo_ddp": narrow_varsr()}}).startswith(
        "state dict: VARSR, "
    )
    assert init_from_public(transformer, narrow_var()).startswith("state dict: VAR, ")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: random_state(vqvae_shapes(channels=32)), r"found a VQVAE, for a tokenizer to start from$"),
        (
            lambda: {"text_pooler.weight": torch.zeros(1), **narrow_var()},
            r"found .*Switti's transformer, whose blocks \(cross-attention, SwiGLU\) are others",
        ),
        (lambda: narrow_transformer().state_dict(), "found HIT-VAR, which is no start but a model"),
        (
            lambda: {"net": {f"layer{i}.weight": torch.zeros(1) for i in range(9)}},
            r"found other keys, such as \['net\.layer0\.weight', .*'net\.layer4\.weight'\]$",
        ),
        (dict, r"found other keys, such as \[\]$"),
    ],
)
def test_what_is_no_public_start_of_a_transformer(state: Callable[[], Any], message: str) -> None:
    given = state()
    given.pop("pos_1LC", None)
    with pytest.raises(CheckpointError, match=rf"^a\.pth: expected a transformer of VAR or VARSR, {message}"):
        init_from_public(narrow_transformer(), given, "a.pth")


def test_another_depth_is_said_so_in_few_words() -> None:
    state = var_state(depth=20, width=80, heads=5, codebook_size=64)
    with pytest.raises(CheckpointError) as caught:
        init_from_var(narrow_transformer(), state, "a/" * 500 + "var_d20.pth")
    message = str(caught.value)
    assert len(message) < 600 and message.count("blocks.") <= 5
    assert message.endswith("; it has 20 blocks of width 80, the model 2 of 32")


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
