"""Starting from weights of VAR, Switti and VARSR, with errors that name what does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.models.hit_var.model import HitVar
from hitsr_fast.models.hit_var.tokenizer import HitTokenizer
from hitsr_fast.models.hit_var.transformer import HitTransformer
from hitsr_fast.models.state_dicts import CheckpointError, check_state, short, taken_from, unwrap

# What tells a family's state dict; all families of transformers have `blocks.*`.
_BODY = ("word_embed.weight", "class_emb.weight", "blocks.0.attn.mat_qkv.weight")
_FAMILIES: dict[str, tuple[str, ...]] = {
    "VQVAE": ("encoder.conv_in.weight", "quant_conv.weight", "quantize.embedding.weight"),
    "VAR": (*_BODY, "pos_1LC"),
    "VARSR": (*_BODY, "decoder_norm.weight"),
    "Switti": ("text_pooler.weight", "word_embed.weight", "head.weight"),
    "HIT-VAR": ("position_grid", "prefix_embed.weight", "lvl_embed.weight"),
    "HIT-VAR's tokenizer": ("encoder.conv_in.weight", "quant_conv.weight", "quantize.codebook"),
}
# What they are where they are of no use.
_FOUND = {
    "VQVAE": "a VQVAE, for a tokenizer to start from",
    "VAR": "VAR, for a transformer to start from",
    "VARSR": "VARSR, for a transformer to start from",
    "Switti": "Switti's transformer, whose blocks (cross-attention, SwiGLU) are others: only its VQVAE fits",
    "HIT-VAR": "HIT-VAR, which is no start but a model: load it as one",
    "HIT-VAR's tokenizer": "HIT-VAR's tokenizer, which is no start but a part of a model: load it as one",
}
# Of the public checkpoints what holds no weights, and what has no place here.
_VQVAE_IGNORED = ("quantize.ema_vocab_hit_SV",)
_VAR_IGNORED = ("lvl_1L", "attn_bias_for_masking")
_VARSR_LEFT = ("con_embedding.", "decoder_norm.", "diffloss.")
# One tensor here, one for each phi there.
_STACKED = ("quantize.phi_weight", "quantize.phi_bias")
# Parts of a decoder that no public one has: they start as they are made, closed.
_OWN = (".lr_in.", ".lr_out.")


def init_from_public(
    part: HitTokenizer | HitTransformer | HitVar, state: Mapping[str, Any], source: str = "state dict"
) -> str:
    """Start a part of a HIT-VAR from a public checkpoint, whichever it is.

    A tokenizer starts from the VQVAE of VAR, Switti or VARSR (`load_vqvae`), a transformer from VAR
    (`init_from_var`) or VARSR (`init_from_varsr`), a whole model from what of both there is. Switti's
    transformer has other blocks and starts nothing.

    Args:
        part: Changed in place; its tokenizer, or its transformer, only if all of that fits.
        state: What the file holds (`read_state`), nested and wrapped as trainers leave it.
        source: What to call it.

    Returns:
        One line on what was taken, and what was not.

    Raises:
        CheckpointError: It has nothing for this part, or what it has does not fit.
    """
    owned: tuple[object, ...] = (part.tokenizer, part.transformer) if isinstance(part, HitVar) else (part,)
    tokenizer = next((one for one in owned if isinstance(one, HitTokenizer)), None)
    transformer = next((one for one in owned if isinstance(one, HitTransformer)), None)
    found = [name for name, keys in _FAMILIES.items() if set(keys) <= set(unwrap(state, keys)[0])]
    said = []
    if tokenizer is not None and "VQVAE" in found:
        said.append(load_vqvae(tokenizer, state, source))
    if transformer is not None and "VAR" in found:
        said.append(init_from_var(transformer, state, source))
    elif transformer is not None and "VARSR" in found:
        said.append(init_from_varsr(transformer, state, source))
    if said:
        return "; ".join(said)
    parts = {"a VQVAE": tokenizer, "a transformer of VAR or VARSR": transformer}
    expected = " or ".join(name for name, own in parts.items() if own is not None)
    if found:
        text = " and ".join(_FOUND.get(name, name) for name in found)
    else:
        text = f"other keys, such as {[short(key, 60) for key in sorted(unwrap(state, ())[0])[:5]]}"
    raise CheckpointError(f"{short(source)}: expected {expected}, found {text}")


def load_vqvae(tokenizer: HitTokenizer, state: Mapping[str, Any], source: str = "state dict") -> str:
    """Load the VQVAE of VAR, Switti or VARSR into a tokenizer, its decoder into each target's.

    Args:
        tokenizer: Changed in place, only if everything fits. What its decoders have for the LR image
            (`decoder_lr`) stays as it is.
        state: Keys of `vae_ch160v4096z32`: `encoder.*`, `decoder.*`, `quantize.*`, `quant_conv.*`,
            `post_quant_conv.*`; nested and wrapped as trainers leave it.
        source: What to call the state dict.

    Returns:
        One line on what was taken.

    Raises:
        CheckpointError: If keys are missing, unexpected or mis-shaped; they are named as in the checkpoint.
    """
    state, wrapping = unwrap(state, _FAMILIES["VQVAE"])
    state = {key: value for key, value in state.items() if key not in _VQVAE_IGNORED}
    own = {key: value for key, value in tokenizer.state_dict().items() if not any(o in key for o in _OWN)}
    sources = {key: _public_keys(key, state, tokenizer.config.num_phi) for key in own}
    expected: dict[str, tuple[int, ...]] = {}
    for key, value in own.items():
        shape = tuple(value.shape[1:] if key in _STACKED else value.shape)
        expected |= dict.fromkeys(sources[key], shape)
    check_state(expected, state, source)
    loaded = {
        key: torch.stack([state[name] for name in names]) if key in _STACKED else state[names[0]]
        for key, names in sources.items()
    }
    tokenizer.load_state_dict(tokenizer.state_dict() | loaded)
    return "; ".join(part for part in (f"{short(source)}: a VQVAE", taken_from(wrapping)) if part)


@torch.no_grad()
def init_from_var(transformer: HitTransformer, state: Mapping[str, Any], source: str = "state dict") -> str:
    """Initialise a transformer from a VAR checkpoint (`var_d16` keys).

    The body, the head and the word embedding are taken as they are; an AdaLN linear that all blocks share
    (VAR-d36) is given to each, its own summand added to the bias. What HIT-VAR has and VAR has not starts
    from its nearest relative: the prefix embedding from the word embedding, its level from the last level;
    the degraded and the clean class from the mean of the ImageNet classes, the class-free one from VAR's;
    each start token from VAR's single one; the positional grid from the last scale's slice of VAR's table,
    enlarged bicubically.

    With other numbers of scales a scale i of L takes the level whose place from 0 to 1 is nearest to its own
    i / (L - 1), of two equally near the coarser; a single scale takes the last.

    Args:
        transformer: Changed in place, only if everything fits.
        state: State dict of VAR, with any number of scales; nested and wrapped as trainers leave it.
        source: What to call the state dict.

    Returns:
        One line on what was taken.

    Raises:
        CheckpointError: If keys are missing, unexpected or mis-shaped, or the last scale's slice cannot be
            told: it is counted in VAR's buffer `lvl_1L`, without which only the published lengths of the
            table are known.
    """
    state, wrapping = unwrap(state, _FAMILIES["VAR"])
    levels_of_rows = state.get("lvl_1L")
    weights = _each_ada_lin({key: value for key, value in state.items() if _is_weight(key)})
    width = transformer.config.transformer.width
    rows = _side(weights, "pos_1LC", 1)
    levels = _check_body(
        transformer, {"pos_start": (1, 1, width), "pos_1LC": (1, rows, width)}, weights, source
    )
    last = _last_rows(rows, levels, levels_of_rows)
    classes, level = weights["class_emb.weight"], weights["lvl_embed.weight"]
    _start(
        transformer,
        weights,
        named=classes[:-1].mean(0, keepdim=True),
        free=classes[-1:],
        prefix_level=level[-1:],
        start=weights["pos_start"],
        grid=weights["pos_1LC"][:, -last:],
    )
    return _said(source, wrapping, "VAR", levels, transformer)


@torch.no_grad()
def init_from_varsr(transformer: HitTransformer, state: Mapping[str, Any], source: str = "state dict") -> str:
    """Initialise a transformer from a VARSR checkpoint, of its restoration or its class-conditional model.

    As from VAR, but for what VARSR has otherwise. It turns queries and keys by rotary positions, which
    HIT-VAR has not: its blocks must learn places anew, from a grid that starts as what VARSR adds to its
    prefix, enlarged bicubically. The prefix's level is that of VARSR's prefix, the start tokens come from the
    last row of its first block, and all classes start from its class of good images. Its class-conditional
    model has no prefix: there level and classes are chosen as from VAR, and the grid stays as it is. VARSR's
    convolutional stem (`con_embedding`) and its refiner (`decoder_norm`, `diffloss`) have no place here.

    Arguments, result and errors are those of `init_from_var`.
    """
    state, wrapping = unwrap(state, _FAMILIES["VARSR"])
    weights = {
        key: value for key, value in state.items() if _is_weight(key) and not key.startswith(_VARSR_LEFT)
    }
    rows = _side(weights, "pos_start", 1)
    width = transformer.config.transformer.width
    levels = _check_body(transformer, {"pos_start": (1, rows, width)}, weights, source)
    if math.isqrt(rows - 1) ** 2 != rows - 1:
        raise CheckpointError(
            f"{short(source)}: pos_start: expected the rows of a square and 1, found {rows}"
        )
    classes, level, start = weights["class_emb.weight"], weights["lvl_embed.weight"], weights["pos_start"]
    restores = rows > 1
    _start(
        transformer,
        weights,
        named=classes[:1] if restores else classes[:-1].mean(0, keepdim=True),
        free=classes[:1] if restores else classes[-1:],
        prefix_level=level[:1] if restores else level[-1:],
        start=start[:, -1:],
        grid=start[:, :-1] if restores else None,
    )
    left = "without its rotary positions, stem and refiner"
    return _said(source, wrapping, "VARSR", levels, transformer, left)


def _start(
    transformer: HitTransformer,
    weights: Mapping[str, Tensor],
    *,
    named: Tensor,
    free: Tensor,
    prefix_level: Tensor,
    start: Tensor,
    grid: Tensor | None,
) -> None:
    """Load a body, and beside it a row for the classes that have a name, one for the class-free one, the
    prefix's level, a start token, and the rows `(1, side * side, width)` of a grid of positions, if any.
    """
    body = transformer.config.transformer
    level = weights["lvl_embed.weight"]
    scales = _nearest_levels(len(transformer.scales), len(level))
    loaded = {key: weights[key] for key in _shared(transformer)} | {
        "prefix_embed.weight": weights["word_embed.weight"],
        "prefix_embed.bias": weights["word_embed.bias"],
        "class_emb.weight": torch.cat([named.expand(body.num_classes - 1, -1), free]),
        "pos_start": start.expand_as(transformer.pos_start),
        "lvl_embed.weight": torch.cat([prefix_level, level[scales]]),
        "position_grid": transformer.position_grid,
    }
    if grid is not None:
        side = math.isqrt(grid.shape[1])
        table = grid.transpose(1, 2).reshape(1, body.width, side, side).float()
        size = (body.position_grid, body.position_grid)
        loaded["position_grid"] = F.interpolate(table, size, mode="bicubic", align_corners=False)
    transformer.load_state_dict(loaded)


def _nearest_levels(scales: int, levels: int) -> list[int]:
    """Of each of so many scales the level whose place is nearest; in integers, so that ties are ties."""
    if scales == 1:
        return [levels - 1]
    return [min(range(levels), key=lambda j: abs(i * (levels - 1) - j * (scales - 1))) for i in range(scales)]


def _shared(transformer: HitTransformer) -> list[str]:
    """Keys that mean the same in HIT-VAR, VAR and VARSR."""
    return [key for key in transformer.state_dict() if key.startswith(("blocks.", "head", "word_embed."))]


def _check_body(
    transformer: HitTransformer,
    others: dict[str, tuple[int, ...]],
    weights: Mapping[str, Tensor],
    source: str,
) -> int:
    """Raise CheckpointError unless there are a body and `others`, of any numbers of classes and scales.

    Returns the number of scales.
    """
    own, body = transformer.state_dict(), transformer.config.transformer
    expected = {key: tuple(own[key].shape) for key in _shared(transformer)} | others
    for key, least in (("class_emb.weight", 2), ("lvl_embed.weight", 1)):
        expected[key] = (max(_side(weights, key, 0), least), body.width)
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    width = _side(weights, "word_embed.weight", 0)
    hint = ""
    if (depth, width) != (body.depth, body.width):
        hint = f"it has {depth} blocks of width {width}, the model {body.depth} of {body.width}"
    check_state(expected, weights, source, hint)
    return len(weights["lvl_embed.weight"])


def _side(weights: Mapping[str, Tensor], key: str, axis: int) -> int:
    """Of a tensor, 1 where it is missing or has no such axis, which `check_state` then says."""
    found = weights.get(key)
    return 1 if found is None or found.dim() <= axis else found.shape[axis]


def _each_ada_lin(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A body whose blocks share an AdaLN linear and each add a row `ada_gss` to it, with one linear each."""
    if "shared_ada_lin.1.weight" not in state:
        return state
    own = {key: value for key, value in state.items() if not key.startswith("shared_ada_lin.")}
    for key in [key for key in own if key.endswith(".ada_gss")]:
        block, row = key.removesuffix(".ada_gss"), own.pop(key).flatten()
        own[f"{block}.ada_lin.1.weight"] = state["shared_ada_lin.1.weight"]
        own[f"{block}.ada_lin.1.bias"] = state["shared_ada_lin.1.bias"] + row
    return own


def _last_rows(rows: int, levels: int, level_of_rows: Tensor | None) -> int:
    """Tokens of the last scale in a table of `rows` positions."""
    if level_of_rows is None or level_of_rows.is_meta:
        published = {680: 256, 2240: 1024, 9451: 4096}
        if rows not in published:
            raise CheckpointError(
                f"pos_1LC: expected the buffer lvl_1L beside it, or one of {sorted(published)} positions, "
                f"found {rows}"
            )
        return published[rows]
    found, counts = level_of_rows.flatten().unique_consecutive(return_counts=True)
    last = int(counts[-1])
    if (
        found.tolist() != list(range(levels))
        or level_of_rows.numel() != rows
        or math.isqrt(last) ** 2 != last
    ):
        raise CheckpointError(
            f"lvl_1L: expected the level, 0 to {levels - 1}, of each of the {rows} rows of pos_1LC and of "
            f"the last a square of rows, found {counts.tolist()[:20]} rows of levels {found.tolist()[:20]}"
        )
    return last


def _said(
    source: str, wrapping: str, family: str, levels: int, transformer: HitTransformer, left: str = ""
) -> str:
    scales = len(transformer.scales)
    spread = f" for the model's {scales}" if levels != scales else ""
    parts = [f"{short(source)}: {family}, its levels of {levels} scales{spread}", left]
    return "; ".join([part for part in (*parts, taken_from(wrapping)) if part])


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
