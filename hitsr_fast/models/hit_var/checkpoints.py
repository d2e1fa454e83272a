"""Loading weights of VAR and Switti, with errors that name what does not fit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.models.base import CheckpointError, check_state
from hitsr_fast.models.hit_var.tokenizer import HitTokenizer
from hitsr_fast.models.hit_var.transformer import HitTransformer

# Buffers of the public checkpoints that hold no weights.
_VQVAE_IGNORED = ("quantize.ema_vocab_hit_SV",)
_VAR_IGNORED = ("lvl_1L", "attn_bias_for_masking")
# One tensor here, one for each phi there.
_STACKED = ("quantize.phi_weight", "quantize.phi_bias")


def load_vqvae(tokenizer: HitTokenizer, state: Mapping[str, Tensor], source: str = "state dict") -> None:
    """Load a VAR or Switti VQVAE (`vae_ch160v4096z32` keys) into a tokenizer, its decoder into each target's.

    Args:
        tokenizer: Changed in place, only if everything fits.
        state: Flat state dict: `encoder.*`, `decoder.*`, `quantize.*`, `quant_conv.*`, `post_quant_conv.*`.
        source: What to call the state dict in an error.

    Raises:
        CheckpointError: If keys are missing, unexpected or mis-shaped; they are named as in the checkpoint.
    """
    state = {key: value for key, value in state.items() if key not in _VQVAE_IGNORED}
    sources = {key: _public_keys(key, state, tokenizer.config.num_phi) for key in tokenizer.state_dict()}
    expected: dict[str, tuple[int, ...]] = {}
    for key, value in tokenizer.state_dict().items():
        shape = tuple(value.shape[1:] if key in _STACKED else value.shape)
        expected |= dict.fromkeys(sources[key], shape)
    check_state(expected, state, source)
    tokenizer.load_state_dict(
        {
            key: torch.stack([state[name] for name in names]) if key in _STACKED else state[names[0]]
            for key, names in sources.items()
        }
    )


@torch.no_grad()
def init_from_var(
    transformer: HitTransformer, state: Mapping[str, Tensor], source: str = "state dict"
) -> None:
    """Initialise a transformer from a VAR checkpoint (`var_d16` keys).

    The body, the head and the word embedding are taken as they are. What HIT-VAR has and VAR has not starts
    from its nearest relative: the prefix embedding from the word embedding, its level from the last level;
    the degraded and the clean class from the mean of the ImageNet classes, the class-free one from VAR's;
    each start token from VAR's single one; the positional grid from the last scale's slice of VAR's table,
    enlarged bicubically.

    Args:
        transformer: Changed in place, only if everything fits.
        state: Flat state dict of VAR.
        source: What to call the state dict in an error.

    Raises:
        CheckpointError: If keys are missing, unexpected or mis-shaped.
    """
    own = transformer.state_dict()
    body = transformer.config.transformer
    width = body.width
    state = {key: value for key, value in state.items() if _is_weight(key)}
    shared = [key for key in own if key.startswith(("blocks.", "head", "word_embed."))]
    expected = {key: tuple(own[key].shape) for key in shared}
    positions = state.get("pos_1LC")
    rows = positions.shape[1] if positions is not None and positions.ndim == 3 else 680
    expected |= {
        "class_emb.weight": (1001, width),
        "pos_start": (1, 1, width),
        "pos_1LC": (1, rows, width),
        "lvl_embed.weight": (len(transformer.scales), width),
    }
    check_state(expected, state, source)

    classes = state["class_emb.weight"]
    levels = state["lvl_embed.weight"]
    last = state["pos_1LC"][:, -_last_square(rows) :]
    side = round(last.shape[1] ** 0.5)
    grid = last.transpose(1, 2).reshape(1, width, side, side).float()
    size = (body.position_grid, body.position_grid)
    loaded = {key: state[key] for key in shared} | {
        "prefix_embed.weight": state["word_embed.weight"],
        "prefix_embed.bias": state["word_embed.bias"],
        "class_emb.weight": torch.cat(
            [classes[:1000].mean(0, keepdim=True).expand(body.num_classes - 1, -1), classes[1000:]]
        ),
        "pos_start": state["pos_start"].expand_as(transformer.pos_start),
        "position_grid": F.interpolate(grid, size, mode="bicubic", align_corners=False),
        "lvl_embed.weight": torch.cat([levels[-1:], levels]),
    }
    transformer.load_state_dict(loaded)


def _public_keys(key: str, state: Mapping[str, Tensor], num_phi: int) -> list[str]:
    """What a tensor of a tokenizer is called in a public VQVAE; the phis have one each, and three ways."""
    if key in _STACKED:
        part = key.removeprefix("quantize.phi_")
        if "quantize.quant_resi.0.weight" in state:  # one a step
            return [f"quantize.quant_resi.{i}.{part}" for i in range(num_phi)]
        if "quantize.quant_resi.qresi.weight" in state:  # one for all
            return [f"quantize.quant_resi.qresi.{part}"] * num_phi
        return [f"quantize.quant_resi.qresi_ls.{i}.{part}" for i in range(num_phi)]
    if key == "quantize.codebook":
        return ["quantize.embedding.weight"]
    if key.startswith("decoders."):
        name = key.split(".", 2)[2]
        return [name if name.startswith("post_quant_conv.") else f"decoder.{name}"]
    return [key]


def _is_weight(key: str) -> bool:
    return key not in _VAR_IGNORED and not key.endswith(".zero_k_bias")


def _last_square(rows: int) -> int:
    """Tokens of the last scale in a table of `rows` positions: VAR's scale lists by their sums."""
    squares = {680: 256, 2240: 1024, 9451: 4096}
    if rows not in squares:
        raise CheckpointError(f"pos_1LC: expected one of {sorted(squares)} positions, found {rows}")
    return squares[rows]
