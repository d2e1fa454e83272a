"""Weight decay goes by what has a parameter, not by how it is called."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from hitsr_fast.compat import VectorQuantizer2
from hitsr_fast.models import HitVar
from hitsr_fast.models.hit_var.config import HIT_D16, HIT_TINY, HitConfig
from hitsr_fast.nn.decay import weight_decay_groups

# Written down from the two models; a name's numbers are left out.
TRANSFORMER_DECAYS = {
    "word_embed.weight",
    "prefix_embed.weight",
    "blocks.attn.mat_qkv.weight",
    "blocks.attn.proj.weight",
    "blocks.ffn.fc1.weight",
    "blocks.ffn.fc2.weight",
    "blocks.ada_lin.weight",
    "head_nm.ada_lin.weight",
    "head.weight",
}
TRANSFORMER_MATRICES_THAT_DO_NOT = {
    "class_emb.weight",
    "lvl_embed.weight",
    "pos_start",
    "position_grid",
    "blocks.attn.scale_mul_1H11",
}
TOKENIZER_MATRICES_THAT_DO_NOT = {"quantize.codebook", "quantize.phi_weight", "quantize.phi_bias"}


def without_numbers(names: list[str], prefix: str) -> set[str]:
    return {re.sub(r"\.\d+", "", name.removeprefix(prefix)) for name in names if name.startswith(prefix)}


@pytest.mark.parametrize("config", [HIT_TINY, HIT_D16], ids=lambda config: config.name)
def test_groups_of_a_whole_model(config: HitConfig) -> None:
    with torch.device("meta"):
        model = HitVar(config)
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    decayed, plain = weight_decay_groups(model)
    assert sorted(decayed + plain) == sorted(shapes) and not set(decayed) & set(plain)

    assert without_numbers(decayed, "transformer.") == TRANSFORMER_DECAYS
    flat = {name for name in plain if shapes[name] == 1}
    rest = sorted(set(plain) - flat)
    assert without_numbers(rest, "transformer.") == TRANSFORMER_MATRICES_THAT_DO_NOT
    assert without_numbers(rest, "tokenizer.") == TOKENIZER_MATRICES_THAT_DO_NOT
    # Of the autoencoder exactly the kernels decay: it has four axes, or it is a bias or of a norm.
    kernels = [name for name in decayed if name.startswith("tokenizer.")]
    assert kernels and all(shapes[name] == 4 and name.endswith(".weight") for name in kernels)


def test_the_order_is_the_models() -> None:
    model = HitVar(replace(HIT_TINY, transformer=replace(HIT_TINY.transformer, depth=1)))
    names = [name for name, _ in model.named_parameters()]
    for group in weight_decay_groups(model):
        assert group == sorted(group, key=names.index)


def test_names_do_not_count() -> None:
    """Letters that elsewhere tell embeddings and norms, in the name of a linear layer, and the reverse."""
    model = nn.ModuleDict({"emb_codebook_start": nn.Linear(2, 2), "head": nn.Embedding(2, 2)})
    assert weight_decay_groups(model) == (
        ["emb_codebook_start.weight"],
        ["emb_codebook_start.bias", "head.weight"],
    )


def test_vars_quantizer_is_ours() -> None:
    decayed, plain = weight_decay_groups(VectorQuantizer2(8, 4, False, v_patch_nums=(1, 2)))
    assert decayed == [] and len(plain) == 1 + 4 * 2


def test_a_shared_parameter_is_listed_once() -> None:
    tied = nn.ModuleList([nn.Embedding(2, 3), nn.Linear(3, 2, bias=False)])
    tied[1].weight = tied[0].weight
    assert weight_decay_groups(tied) == ([], ["0.weight"])


def test_an_unknown_type_is_an_error() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(2, 2))

    model = nn.ModuleDict({"inner": Odd()})
    with pytest.raises(TypeError, match=r"^inner\.table: expected .* `undecayed`; found one of Odd$"):
        weight_decay_groups(model)
    Odd.undecayed = ("table",)  # type: ignore[attr-defined]
    assert weight_decay_groups(model) == ([], ["inner.table"])


def test_an_unknown_parameter_of_a_known_type_is_an_error() -> None:
    linear = nn.Linear(2, 2)
    linear.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match=r"^extra: "):
        weight_decay_groups(linear)
