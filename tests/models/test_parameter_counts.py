"""How large the models are, part by part, held against the shapes of the published checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hitsr_fast.models import HitVar
from hitsr_fast.models.hit_var.config import HIT_D16, HIT_TINY
from tests.models.public_checkpoints import VAR_BUFFERS, var_shapes, vqvae_shapes


def parameters(module: nn.Module | nn.Parameter) -> int:
    return module.numel() if isinstance(module, nn.Parameter) else sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def hit_d16() -> HitVar:
    with torch.device("meta"):
        return HitVar(HIT_D16)


def published(prefixes: tuple[str, ...]) -> int:
    """Weights of the published autoencoder under the given keys."""
    return sum(math.prod(shape) for key, shape in vqvae_shapes().items() if key.startswith(prefixes))


def test_tokenizer_by_part(hit_d16: HitVar) -> None:
    tokenizer = hit_d16.tokenizer
    assert parameters(tokenizer.encoder) == published(("encoder.",)) == 44_107_872
    decoders = [parameters(decoder) for decoder in tokenizer.decoders]
    assert decoders == [published(("decoder.", "post_quant_conv."))] * 3 == [64_663_171] * 3
    assert parameters(tokenizer.quant_conv) == published(("quant_conv.",)) == 9_248
    bank = published(("quantize.embedding.", "quantize.quant_resi."))
    assert parameters(tokenizer.quantize) == bank == 168_064
    assert parameters(tokenizer) == 44_107_872 + 3 * 64_663_171 + 9_248 + 168_064 == 238_274_697


def test_transformer_by_part(hit_d16: HitVar) -> None:
    transformer, width = hit_d16.transformer, 1024
    assert [parameters(block) for block in transformer.blocks] == [18_888_720] * 16
    assert parameters(transformer.head_nm) == 2 * width * width + 2 * width
    assert parameters(transformer.head) == 4096 * width + 4096
    assert parameters(transformer.word_embed) == parameters(transformer.prefix_embed) == 33 * width
    assert parameters(transformer.class_emb) == 3 * width
    assert parameters(transformer.lvl_embed) == 11 * width
    assert parameters(transformer.pos_start) == 16 * width
    assert parameters(transformer.position_grid) == 64 * 64 * width
    assert parameters(transformer) == 312_809_728


def test_transformer_is_var_d16_with_other_embeddings(hit_d16: HitVar) -> None:
    """VAR-d16 has 310.28 M weights; without the positional grid the body here has 1.7 M less."""
    width = 1024
    var = sum(math.prod(shape) for key, shape in var_shapes().items() if not key.endswith(VAR_BUFFERS))
    assert var == 310_283_520
    classes = (3 - 1001) * width
    start_tokens = (16 - 1) * width
    levels = (11 - 10) * width
    positions = (64 * 64 - 680) * width
    prefix_embedding = 33 * width
    difference = classes + start_tokens + levels + positions + prefix_embedding
    assert parameters(hit_d16.transformer) == var + difference


def test_hit_tiny_fits_the_package() -> None:
    with torch.device("meta"):
        model = HitVar(HIT_TINY)
    assert all(tensor.is_floating_point() for tensor in model.state_dict().values())
    half = 2 * sum(tensor.numel() for tensor in model.state_dict().values())
    assert half < 32e6 - 100_000, "with room for the file's header"
