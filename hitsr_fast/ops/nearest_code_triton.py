"""Triton backend of `nearest_code`: packs codebooks and launches the kernels of kernels/nearest_code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hitsr_fast.backends import MAX_GRID, Limit, cdiv

LAYOUT = "triton"
LIMITS = (Limit("C", -1, 256, "codebook"),)

_TILE = 128  # codes that a turn of the screen's loop takes
_CLASSES = 4  # of a tile; each is kept or dropped as a whole
_WORKSPACE = 2**23  # floats, 32 MiB, for what lies between kernels: a large second-level cache holds it
_PROGRAMS = 512  # enough to fill a large GPU; where rows give fewer, the tiles are shared out as well


def too_many_groups(x: Tensor, codebook: Tensor, *_rest: Any) -> str | None:
    """Why the groups of a codebook do not fit the grid, or None."""
    groups = codebook.shape[0] if codebook.dim() == 3 else 1
    return f"needs at most {MAX_GRID} groups, found {groups}" if groups > MAX_GRID else None


def as_maps(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Rows `(N, C)`, `(G, N, C)` or a map `(B, C, H, W)` as a view `(G, B, H, W, C)`; shape of the result."""
    if x.dim() == 4:
        return x.movedim(1, -1)[None], (x.shape[0], *x.shape[2:])
    groups = x.shape[0] if x.dim() == 3 else 1
    return x.reshape(groups, 1, 1, *x.shape[-2:]), tuple(x.shape[:-1])


def padded_channels(channels: int) -> int:
    """Channels of the packed codes: a power of two, as are all Triton blocks, and 16 at least for its dot."""
    return max(16, 1 << (channels - 1).bit_length())


def round_constants(channels: int) -> dict[str, int]:
    """Block sizes of the round kernel: rows x channels of one size for all C."""
    padded = padded_channels(channels)
    return {"C": channels, "CP": padded, "ROWS": 1024 // padded}


def screen_constants(channels: int) -> dict[str, int]:
    """Block sizes of the screen. Wide rows come in smaller blocks, or they would fill a program's memory."""
    padded = padded_channels(channels)
    tile = {"CLASSES": _CLASSES, "BLOCK_K": _TILE // 2, "PARTS": 2}
    return {"CP": padded, "BLOCK_N": 128 if padded <= 64 else 64} | tile


def recheck_constants(channels: int, metric: str) -> dict[str, int]:
    """Block sizes of the re-check. A program is one warp, so that no sum or minimum crosses warps."""
    tile = {"CLASSES": _CLASSES, "MEMBERS": _TILE // _CLASSES, "CHUNK": 128}
    return {"CP": padded_channels(channels), "ROWS": 1, "BLOCK_C": 8 if metric == "cosine" else 16} | tile


def screen_options(channels: int) -> dict[str, int]:
    """Options of the screen's launch. Two stages of the widest rows exceed some chips' shared memory."""
    wide = padded_channels(channels) > 128
    return {"num_warps": 8 if wide else 4, "num_stages": 1 if wide else 2, "enable_fp_fusion": False}


# Of the other launches. The definition multiplies and adds in two steps; where one step is meant, the kernels
# say so.
OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}


def prepare(codebook: Tensor, metric: str) -> tuple[str, tuple[Tensor, ...]]:
    """Name of the layout and the packed form of a codebook, `(K, C)` or `(G, K, C)`.

    With tiles T = ceil(K / 128) and C padded to CP, the parts are
        mean: float32 `(G, C)`, what the screen takes off rows multiplied by `before`; 0 for cosine.
        codes: float16 `(G, 128 T, CP)`, centred, scaled, and put where the screen wants a tile's codes.
        half_norms: float32 `(G, 128 T)`, of the centred, scaled codes (0 for cosine), infinite for padding.
        exact: `(G, 4 T, C, 32)`, by classes, float32 as given, or float64 unit vectors for cosine.
        bounds: float32 `(G, 5)`: the scale as two factors, `before` at most and `after` at least 1; and, all
            scaled, the lengths of the longest centred code, of the most that rounding took from one, and of
            the longest vector that the definition multiplies by.
    """
    given = (codebook if codebook.dim() == 3 else codebook[None]).double()
    cosine = metric == "cosine"
    if cosine:
        given = _unit_vectors(given)
    groups, size, channels = given.shape
    # Any value near the mean will do, so long as it is the same for rows and codes.
    centre = given.mean(dim=1, keepdim=True).float().double()
    scale = _scale(torch.linalg.vector_norm(given - centre, dim=2).amax(dim=1))
    before, after = scale.clamp(max=1.0), scale.clamp(min=1.0)
    mean = (centre.squeeze(1) * before[:, None]).float()
    centred = (given - (mean.double() / before[:, None])[:, None]) * scale[:, None, None]
    kept = centred.to(torch.float16)
    kept = torch.where(kept.abs() < torch.finfo(torch.float16).tiny, 0, kept)  # subnormal numbers
    longest = torch.linalg.vector_norm(centred, dim=2).amax(dim=1)
    lost = torch.linalg.vector_norm(centred - kept, dim=2).amax(dim=1)
    up = 1 + 2.0**-20  # over the rounding of the lines above and of the cast to float32
    bounds = torch.stack([before, after, longest * up, lost * up, (scale if cosine else longest) * up], dim=1)

    tiles = cdiv(size, _TILE)
    codes = kept.new_zeros(groups, tiles * _TILE, padded_channels(channels))
    codes[:, :size, :channels] = kept
    half_norms = centred.new_full((groups, tiles * _TILE), torch.inf)
    half_norms[:, :size] = 0 if cosine else centred.square().sum(dim=2) / 2
    exact = given.new_zeros((groups, tiles * _TILE, channels), dtype=given.dtype if cosine else torch.float32)
    exact[:, :size] = given
    exact = exact.view(groups, tiles * _CLASSES, _TILE // _CLASSES, channels)
    parts = (
        mean * 0 if cosine else mean,
        _in_classes(codes),
        _in_classes(half_norms.float()[..., None]).squeeze(-1),
        exact.transpose(2, 3).contiguous(),
        bounds.float(),
    )
    return LAYOUT, parts


def _unit_vectors(codes: Tensor) -> Tensor:
    """float64 codes divided by their lengths, squares added channel by channel as the definition does."""
    energy = torch.zeros_like(codes[..., 0])
    for channel in codes.unbind(-1):
        energy += channel * channel
    return codes / torch.where(energy > 0, energy.sqrt(), 1.0)[..., None]


def _scale(length: Tensor) -> Tensor:
    """Power of two `(G,)` that brings a length `(G,)` into [2^13, 2^14), or as near as float32 can tell."""
    exponent = (14 - torch.frexp(length).exponent).clamp(-126, 126)
    return (exponent.long() + 1023 << 52).view(torch.float64)  # its bits: exact on every device


def _in_classes(codes: Tensor) -> Tensor:
    """`(G, 128 T, ...)`: of eight neighbours in a tile, the screen takes two for each of its four classes.

    A class is thus 32 neighbours of the codebook.
    """
    pairs = _TILE // _CLASSES // 2
    tiles = codes.view(codes.shape[0], -1, _CLASSES, pairs, 2, codes.shape[-1])
    return tiles.transpose(2, 3).reshape(codes.shape)


def nearest_code_triton(x: Tensor, codebook: Tensor, parts: list[Tensor], layout: str, metric: str) -> Tensor:
    """As `reference.nearest_code`, and for maps."""
    from hitsr_fast.kernels.nearest_code import (
        _nearest_code_recheck_kernel,
        _nearest_code_round_kernel,
        _nearest_code_screen_kernel,
    )

    maps, shape = as_maps(x)
    groups, batch, height, width, channels = maps.shape
    count = batch * height * width
    indices = torch.empty((groups, count), dtype=torch.int64, device=x.device)
    if indices.numel() == 0:
        return indices.view(shape)

    packed = parts if layout == LAYOUT else prepare(codebook, metric)[1]
    mean, codes, half_norms, exact, bounds = packed
    tiles = codes.shape[1] // _TILE
    rounding, screen = round_constants(channels), screen_constants(channels)
    recheck, cosine = recheck_constants(channels, metric), metric == "cosine"
    block = screen["BLOCK_N"]
    row_floats = groups * (tiles * _CLASSES + codes.shape[2] // 2 + 3)
    most = min(max(_WORKSPACE // row_floats // block, 1) * block, count)
    minima = torch.empty(groups * tiles * _CLASSES * most, dtype=torch.float32, device=x.device)
    margins = torch.empty(groups * 3 * most, dtype=torch.float32, device=x.device)
    rounded = torch.empty(groups * most * codes.shape[2], dtype=torch.float16, device=x.device)
    for begin in range(0, count, most):
        end = min(begin + most, count)
        place = (begin, end, height, width)
        _nearest_code_round_kernel[(cdiv(end - begin, rounding["ROWS"]), groups)](
            maps, mean, bounds, rounded, margins, *place, maps.stride(),
            COSINE=cosine, **rounding, **OPTIONS,
        )  # fmt: skip
        row_blocks = cdiv(end - begin, block)
        share = cdiv(tiles, cdiv(_PROGRAMS, row_blocks * groups))
        _nearest_code_screen_kernel[(row_blocks, cdiv(tiles, share), groups)](
            rounded, codes, half_norms, minima, margins, end - begin, tiles, share,
            **screen, **screen_options(channels),
        )  # fmt: skip
        _nearest_code_recheck_kernel[(cdiv(end - begin, recheck["ROWS"]), groups)](
            maps, exact, bounds, minima, margins, indices,
            *place, codebook.shape[-2], channels, tiles, maps.stride(), indices.stride(),
            COSINE=cosine, **recheck, **OPTIONS,
        )  # fmt: skip
    return indices.view(shape)
