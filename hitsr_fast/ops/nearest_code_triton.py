"""Triton backend of `nearest_code`: launches the kernels of kernels/nearest_code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hitsr_fast.backends import MAX_GRID, Limit, cdiv
from hitsr_fast.ops.packed_codebook import CLASSES, LAYOUT, MEMBERS, TILE, pack_triton, padded_channels

LIMITS = (Limit("C", -1, 256, "codebook"),)

_WORKSPACE = 2**23  # floats, 32 MiB, for what lies between kernels: a large second-level cache holds it
_WARPS = 4096  # programs of one warp that a large GPU holds at once: 32 on each of 132 multiprocessors
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


def round_constants(channels: int) -> dict[str, int]:
    """Block sizes of the round kernel: rows x channels of one size for all C."""
    padded = padded_channels(channels)
    return {"C": channels, "CP": padded, "ROWS": 1024 // padded}


def screen_constants(channels: int) -> dict[str, int]:
    """Block sizes of the screen. Wide rows come in smaller blocks, or they would fill a program's memory."""
    padded = padded_channels(channels)
    tile = {"CLASSES": CLASSES, "BLOCK_K": TILE // 2, "PARTS": 2}
    return {"CP": padded, "BLOCK_N": 128 if padded <= 64 else 64} | tile


def recheck_constants(channels: int, metric: str, rows: int) -> dict[str, int]:
    """Block sizes of the re-check. A program is one warp, so that no sum or minimum crosses warps.

    Up to as many rows as a large GPU holds programs, each has one; of more rows a warp takes several side by
    side, which wait for memory together.
    """
    cosine = metric == "cosine"  # compares in float64: two rows take the registers of four
    together = 1 if rows <= _WARPS else 2 if cosine else 4
    block = (8 if cosine else 16) // (1 if together == 1 else 2)
    tile = {"CLASSES": CLASSES, "MEMBERS": MEMBERS, "CHUNK": 128}
    return {"CP": padded_channels(channels), "ROWS": together, "BLOCK_C": block} | tile


def screen_options(channels: int) -> dict[str, int]:
    """Options of the screen's launch. Two stages of the widest rows exceed some chips' shared memory."""
    wide = padded_channels(channels) > 128
    return {"num_warps": 8 if wide else 4, "num_stages": 1 if wide else 2, "enable_fp_fusion": False}


# Of the other launches. The definition multiplies and adds in two steps; where one step is meant, the kernels
# say so.
OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}


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

    packed = parts if layout == LAYOUT else pack_triton(codebook, metric)[1]
    mean, codes, half_norms, exact, bounds = packed
    tiles = codes.shape[1] // TILE
    rounding, screen = round_constants(channels), screen_constants(channels)
    cosine = metric == "cosine"
    block = screen["BLOCK_N"]
    row_floats = groups * (tiles * CLASSES + codes.shape[2] // 2 + 3)
    most = min(max(_WORKSPACE // row_floats // block, 1) * block, count)
    recheck = recheck_constants(channels, metric, groups * most)
    minima = torch.empty(groups * tiles * CLASSES * most, dtype=torch.float32, device=x.device)
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
