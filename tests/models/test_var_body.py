"""The body against VAR's formulas, written out from its state dict: its published weights expect them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.micro import MICRO, micro_model
from tests.tolerances import TOLERANCES

WIDTH, HEADS = MICRO.transformer.width, MICRO.transformer.heads


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def var_attention(x: Tensor, weights: dict[str, Tensor], level: Tensor, l2_norm: bool) -> Tensor:
    """Fused qkv without key bias; q and k of length one and a learned scale, or a scale of 0.25 / sqrt(D)."""
    q_bias, v_bias = weights["q_bias"], weights["v_bias"]
    qkv = x @ weights["mat_qkv.weight"].T + torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv.split(WIDTH, dim=-1))
    if l2_norm:
        scale = weights["scale_mul_1H11"].clamp(max=torch.tensor(100.0).log()).exp()
        q, k = q / q.norm(dim=-1, keepdim=True) * scale, k / k.norm(dim=-1, keepdim=True)
    else:
        q = q * 0.25 / (WIDTH // HEADS) ** 0.5
    scores = (q @ k.mT).masked_fill(level[:, None] < level[None, :], -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out @ weights["proj.weight"].T + weights["proj.bias"]


def var_body(x: Tensor, condition: Tensor, state: dict[str, Tensor], level: Tensor, l2_norm: bool) -> Tensor:
    """Logits of all rows."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    for i in range(MICRO.transformer.depth):
        block = part(f"blocks.{i}.")
        modulation = F.silu(condition) @ block["ada_lin.1.weight"].T + block["ada_lin.1.bias"]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation[:, None].split(WIDTH, dim=-1)
        attended = var_attention(norm(x) * (1 + scale1) + shift1, part(f"blocks.{i}.attn."), level, l2_norm)
        x = x + gamma1 * attended
        hidden = (norm(x) * (1 + scale2) + shift2) @ block["ffn.fc1.weight"].T + block["ffn.fc1.bias"]
        hidden = F.gelu(hidden, approximate="tanh") @ block["ffn.fc2.weight"].T + block["ffn.fc2.bias"]
        x = x + gamma2 * hidden
    modulation = F.silu(condition) @ state["head_nm.ada_lin.1.weight"].T + state["head_nm.ada_lin.1.bias"]
    scale, shift = modulation[:, None].split(WIDTH, dim=-1)
    return (norm(x) * (1 + scale) + shift) @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("l2_norm", [True, False])
@torch.no_grad()
def test_forward_is_vars(l2_norm: bool) -> None:
    config = replace(MICRO, transformer=replace(MICRO.transformer, attn_l2_norm=l2_norm))
    transformer = micro_model(config, torch.float64).transformer
    scales, prefix = config.tokenizer.scales, config.tokenizer.latent_size**2
    lengths = torch.tensor([scale * scale for scale in scales])
    level = torch.cat(
        [torch.zeros(prefix, dtype=torch.int64), torch.arange(len(scales)).repeat_interleave(lengths)]
    )
    features = torch.randn(2, config.tokenizer.code_dim, 8, 8, dtype=torch.float64)
    rows = torch.randn(2, int(lengths[1:].sum()), config.tokenizer.code_dim, dtype=torch.float64)
    classes = torch.tensor([0, 1])
    state = transformer.state_dict()

    def position(side: int) -> Tensor:
        return F.adaptive_avg_pool2d(state["position_grid"], side).flatten(2).mT

    condition, levels = state["class_emb.weight"][classes], state["lvl_embed.weight"]
    embedded = features.flatten(2).mT @ state["prefix_embed.weight"].T + state["prefix_embed.bias"]
    parts = [embedded + levels[0] + position(8)]
    parts.append(condition[:, None] + state["pos_start"] + levels[1] + position(scales[0]))
    for step, block in enumerate(rows.split(lengths[1:].tolist(), dim=1), start=1):
        word = block @ state["word_embed.weight"].T + state["word_embed.bias"]
        parts.append(word + levels[step + 1] + position(scales[step]))
    expected = var_body(torch.cat(parts, 1), condition, state, level, l2_norm)[:, prefix:]

    found = transformer(features, classes, rows)
    torch.testing.assert_close(found, expected.float(), **TOLERANCES["float32_reordered"]._asdict())
