"""`HitTransformer`: a VAR body that predicts an image's token pyramid from the features of its LR version."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hitsr_fast.models.hit_var.config import HitConfig
from hitsr_fast.nn.attention import SelfAttention
from hitsr_fast.nn.recompute import gated_linear, modulated_linear
from hitsr_fast.ops import modulated_layer_norm


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class AdaLNBlock(nn.Module):
    """VAR's block: attention and feed-forward, each normalised, modulated and gated by the class vector."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, l2_norm: bool) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads, l2_norm)
        self.ffn = FeedForward(width, int(width * mlp_ratio))
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        block_lengths: Sequence[int],
        keep: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:
        """Of rows `(B, T, width)` under class vectors `(B, width)`.

        `keep` `(2, B)` multiplies the gates of the two branches. Only rows from `first` on are returned: of
        the others a block that none follows needs keys and values alone.
        """
        gamma1, gamma2, scale1, scale2, shift1, shift2 = self.ada_lin(condition).chunk(6, dim=-1)
        if keep is not None:
            gamma1, gamma2 = gamma1 * keep[0, :, None], gamma2 * keep[1, :, None]
        attended = self.attn(x, (scale1, shift1), block_lengths)[:, first:]
        proj, fc1, fc2 = self.attn.proj, self.ffn.fc1, self.ffn.fc2
        x = gated_linear(x[:, first:], gamma1, _same, (attended,), proj.weight, proj.bias)
        hidden = modulated_linear(x, (scale2, shift2), fc1.weight, fc1.bias)
        return gated_linear(x, gamma2, _gelu, (hidden,), fc2.weight, fc2.bias)


class AdaLNBeforeHead(nn.Module):
    """Modulated norm before the classifier; the order of the two parts is scale, shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.ada_lin(condition).chunk(2, dim=-1)
        return modulated_layer_norm(x, scale, shift)


def _modulation(ada_lin: nn.Sequential) -> nn.Linear:
    linear = ada_lin[1]
    assert isinstance(linear, nn.Linear)
    return linear


class HitTransformer(nn.Module):
    """Next-scale predictor of HIT-VAR (section 3.2) with the body of VAR-d16.

    The sequence is one block of prefix (LR features, a row a cell of the full latent) and start tokens (as
    many as the first scale has), then one block a further scale. A token sees its own block and all earlier
    ones.

    Nothing in it is random: whoever trains it draws the classes and the dropped branches.
    """

    undecayed = ("pos_start", "position_grid")

    def __init__(self, config: HitConfig) -> None:
        super().__init__()
        self.config = config
        body, tokenizer = config.transformer, config.tokenizer
        width = body.width
        self.scales = tokenizer.scales
        self.prefix_length = tokenizer.latent_size**2
        self.block_lengths = tokenizer.pyramid.block_lengths(self.prefix_length)

        self.word_embed = nn.Linear(tokenizer.code_dim, width)
        self.prefix_embed = nn.Linear(tokenizer.code_dim, width)
        self.class_emb = nn.Embedding(body.num_classes, width)
        self.pos_start = nn.Parameter(torch.empty(1, self.scales[0] ** 2, width))
        self.position_grid = nn.Parameter(torch.empty(1, width, body.position_grid, body.position_grid))
        self.lvl_embed = nn.Embedding(len(self.scales) + 1, width)  # row 0 is the prefix's
        blocks = [AdaLNBlock(width, body.heads, body.mlp_ratio, body.attn_l2_norm) for _ in range(body.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.head_nm = AdaLNBeforeHead(width)
        self.head = nn.Linear(width, tokenizer.codebook_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as VAR does: std sqrt(1 / 3C), small head and gates, scaled residual outputs."""
        body = self.config.transformer
        std = math.sqrt(1.0 / (3 * body.width))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and isinstance(module.bias, nn.Parameter):
                nn.init.zeros_(module.bias)
        for parameter in (self.pos_start, self.position_grid):
            nn.init.trunc_normal_(parameter, std=std)
        self.head.weight.mul_(0.02)
        _modulation(self.head_nm.ada_lin).weight.mul_(0.5)
        for block in self.blocks:
            assert isinstance(block, AdaLNBlock)
            ada = _modulation(block.ada_lin)
            ada.weight[2 * body.width :].mul_(0.5)
            ada.weight[: 2 * body.width].mul_(1e-3)
            ada.bias[: 2 * body.width].fill_(body.gate_init)
            for linear in (block.attn.proj, block.ffn.fc2):
                linear.weight.div_(math.sqrt(2 * body.depth))

    def positions(self, side: int) -> Tensor:
        """The positional grid at a scale: `(1, side * side, width)`."""
        if self.config.transformer.position_resample == "area":
            grid = F.adaptive_avg_pool2d(self.position_grid, side)
        else:
            # In float32: the antialiased filter has no 16-bit version on the CPU.
            grid = F.interpolate(self.position_grid.float(), (side, side), mode="bicubic", antialias=True)
        return grid.flatten(2).transpose(1, 2).to(self.position_grid.dtype)

    def first_block(self, lr_features: Tensor, condition: Tensor) -> Tensor:
        """Prefix and start tokens: `(B, prefix + first scale, width)`."""
        levels = self.lvl_embed.weight
        prefix = self.prefix_embed(lr_features.flatten(2).transpose(1, 2))
        prefix = prefix + levels[0] + self.positions(self.config.tokenizer.latent_size)
        start = condition[:, None] + self.pos_start + levels[1] + self.positions(self.scales[0])
        return torch.cat([prefix, start + self.injected(lr_features, 0)], 1)

    def scale_block(self, inputs: Tensor, lr_features: Tensor, step: int) -> Tensor:
        """Tokens of a later scale from its input rows `(B, L, C)`: `(B, L, width)`."""
        place = self.lvl_embed.weight[step + 1] + self.positions(self.scales[step])
        embedded: Tensor = self.word_embed(inputs) + place + self.injected(lr_features, step)
        return embedded

    def injected(self, lr_features: Tensor, step: int) -> Tensor | float:
        """LR features at a scale's side, embedded like the prefix: `(B, L, width)`; 0 with the option off."""
        if not self.config.transformer.prefix_injection:
            return 0.0
        pooled = F.adaptive_avg_pool2d(lr_features, self.scales[step])
        embedded: Tensor = self.prefix_embed(pooled.flatten(2).transpose(1, 2))
        return embedded

    def hidden(
        self, lr_features: Tensor, class_id: Tensor, inputs: Tensor, *, keep: Tensor | None = None
    ) -> Tensor:
        """What the classifier `head` makes logits of, for all tokens under teacher forcing.

        A loss that takes `head.weight` and `head.bias` with it never holds the logits.

        Args:
            lr_features: `(B, C, h, w)` continuous latent of the up-sampled LR, `h = w` the full latent's
                side.
            class_id: `(B,)` int64; the last class is the class-free one.
            inputs: `(B, T - tokens of the first scale, C)`, see `ResidualQuantizer.teacher_inputs`.
            keep: floating `(depth, 2, B)`, factors of the gates of each block's two branches: stochastic
                depth that drops a share p has 0 or 1 / (1 - p). None drops nothing.

        Returns:
            `(B, T, width)` in the weights' dtype, whatever floating ones the arguments have.
        """
        dtype = self.head.weight.dtype
        lr_features, inputs = lr_features.to(dtype), inputs.to(dtype)
        condition = self.class_emb(class_id)
        parts = [self.first_block(lr_features, condition)]
        lengths = self.block_lengths[1:]
        for step, rows in enumerate(inputs.split(lengths, dim=1), start=1):
            parts.append(self.scale_block(rows, lr_features, step))
        x = torch.cat(parts, 1)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            first = self.prefix_length if i == last else 0
            x = block(x, condition, self.block_lengths, None if keep is None else keep[i], first)
        out: Tensor = self.head_nm(x, condition)
        return out

    def forward(self, lr_features: Tensor, class_id: Tensor, inputs: Tensor) -> Tensor:
        """Logits of all tokens under teacher forcing: float32 `(B, T, K)`; see `hidden`."""
        logits: Tensor = self.head(self.hidden(lr_features, class_id, inputs))
        return logits.float()
