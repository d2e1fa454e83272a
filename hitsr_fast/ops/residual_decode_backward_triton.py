"""Triton backend of `residual_decode_backward`: each kernel takes all scales at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hitsr_fast.backends import MAX_GRID, cdiv

_WORKSPACE = 2**26  # floats, 256 MiB, of maps: what does not fit is taken in turns, image by image
_PROGRAMS = 1024  # that sum the gradient of phi: enough to fill a large GPU
_A = -0.75  # of the bicubic weights
_BLOCKS = {
    "reach": {"BLOCK_P": 64, "num_warps": 4},
    "across": {"BLOCK_P": 32, "num_warps": 4},
    "codes": {"BLOCK_T": 32, "num_warps": 4},
    "phi": {"BLOCK_T": 32, "num_warps": 4},
    "weight": {"BLOCK": 64, "BLOCK_S": 16, "num_warps": 4},
    "bias": {"BLOCK_S": 128, "num_warps": 4},
    "runs": {"BLOCK_N": 128, "ROWS": 16, "num_warps": 4},
}


def constants(kernel: str, channels: int) -> dict[str, Any]:
    """Block sizes and options of a kernel, one of `_BLOCKS`."""
    block = 32 if channels > 16 else 16
    sizes = dict(_BLOCKS[kernel])
    if kernel != "across":
        sizes["C"] = channels
    if kernel != "weight":
        sizes["BLOCK_C"] = block
    if kernel != "runs":
        sizes["CP"] = cdiv(channels, block) * block
    return sizes | {"num_stages": 1, "enable_fp_fusion": True}


class Bands(NamedTuple):
    """Where the positions of some scales along a side lie on the map's side, and their shares of its places.

    Attributes:
        table: int32 `(2 or 3, positions)`: first place, number of places, and for columns the map's number.
        weights: float32 `(positions, stride)`. With a margin of 1 the bands are wider by a place on either
            side, and a row begins two places before the first that has a share.
    """

    table: Tensor
    weights: Tensor

    @property
    def positions(self) -> int:
        """How many."""
        return self.table.shape[1]


class Plan(NamedTuple):
    """Tables of a pyramid on a map, as tensors of a device.

    Attributes:
        columns, rows: of all scales.
        places: int32 `(2, T)`: row and column of each token, counted over all scales.
        tiles: int32 `(., 3)`: phi, first token and end of each, by phi.
        tiles_of: how many of them belong to each phi.
        phis: int32 `(S,)`: of each scale.
    """

    columns: Bands
    rows: Bands
    places: Tensor
    tiles: Tensor
    tiles_of: tuple[int, ...]
    phis: Tensor


# Tables are never dropped: a captured graph has their addresses.
@functools.cache
def plan(
    scales: tuple[int, ...],
    phi_index: tuple[int, ...],
    size: tuple[int, int],
    num_phi: int,
    each: bool,
    margin: int,
    tile: int,
    device: torch.device,
) -> Plan:
    """The tables for some scales: `each` has a gradient of its own. They are copied to the device, once."""
    heights, widths = scales[::2], scales[1::2]
    new = functools.partial(torch.tensor, dtype=torch.int32, device=device)
    shares_of = functools.partial(torch.tensor, dtype=torch.float32, device=device)
    places, tiles, first, row, column = [], [], 0, 0, 0
    for h, w in zip(heights, widths, strict=True):
        places += [(row + i, column + j) for i in range(h) for j in range(w)]
        row, column = row + h, column + w
    for phi, members in groupby(zip(phi_index, heights, widths, strict=True), lambda scale: scale[0]):
        end = first + sum(h * w for _, h, w in members)
        tiles += [(phi, start, min(start + tile, end)) for start in range(first, end, tile)]
        first = end
    tiles.sort()
    maps = [number if each else 0 for number, w in enumerate(widths) for _ in range(w)]
    rows, columns = (_bands(*side, margin) for side in ((heights, size[0]), (widths, size[1])))
    return Plan(
        Bands(new([*columns[:2], maps]), shares_of(columns[2])),
        Bands(new(rows[:2]), shares_of(rows[2])),
        new(list(zip(*places, strict=True))),
        new(tiles),
        tuple(sum(phi == used for used, *_ in tiles) for phi in range(num_phi)),
        new(phi_index),
    )


@functools.cache
def shares(tiles_of: tuple[int, ...], images: int, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """How about `most` programs share out the tiles of some images, phi by phi; on a device for good, too.

    Returns:
        int32 `(., 4)`: first tile and tiles of a phi, and from which to which of them, over all images, a
        program sums; int32 `(P + 1,)`: where the programs of a phi begin.
    """
    share = cdiv(images * sum(tiles_of), most)
    rows, slots = [], [0]
    for (first, end), count in zip(pairwise([0, *accumulate(tiles_of)]), tiles_of, strict=True):
        total = images * count
        rows += [(first, end - first, start, min(start + share, total)) for start in range(0, total, share)]
        slots.append(len(rows))
    return (
        torch.tensor(rows, dtype=torch.int32, device=device),
        torch.tensor(slots, dtype=torch.int32, device=device),
    )


def _bands(sides: Sequence[int], length: int, margin: int) -> tuple[list[int], list[int], list[list[float]]]:
    """First places, numbers of places and shares of all positions of scales along a side of a map."""
    found = {side: _shares_of_places(side, length) for side in set(sides)}
    bands = [band for side in sides for band in found[side]]
    firsts = [min(band) - margin for band in bands]
    counts = [max(band) - min(band) + 1 + 2 * margin for band in bands]
    stride = max(counts) + 2 * margin
    weights = [
        [band.get(first - margin + place, 0.0) for place in range(stride)]
        for first, band in zip(firsts, bands, strict=True)
    ]
    return firsts, counts, weights


def _shares_of_places(side: int, length: int) -> list[dict[int, float]]:
    """Of each position of a scale's side: the bicubic weights with which places of the map look at it."""
    bands: list[dict[int, float]] = [{} for _ in range(side)]
    for place in range(length):
        for position, weight in _taps(place, side, length):
            band = bands[min(max(position, 0), side - 1)]
            if weight != 0:
                band[place] = band.get(place, 0.0) + weight
    return bands


def _taps(place: int, side: int, length: int) -> Iterator[tuple[int, float]]:
    """The four neighbours of a place, whose centre lies at ((2 place + 1) side / length - 1) / 2."""
    whole, part = divmod((2 * place + 1) * side + length, 2 * length)
    fraction = part / (2 * length)
    for neighbour in range(4):
        away = abs(fraction - (neighbour - 1))
        if neighbour in (1, 2):
            weight = ((_A + 2) * away - (_A + 3)) * away * away + 1
        else:
            weight = ((_A * away - 5 * _A) * away + 8 * _A) * away - 4 * _A
        yield whole - 2 + neighbour, weight


def residual_decode_backward_triton(
    grad: Tensor,
    grad_per_scale: Tensor,
    indices: Tensor,
    codebook: Tensor,
    phi_weight: Tensor,
    scales: Sequence[int],
    phi_index: Sequence[int],
    phi_ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.residual_decode_backward`."""
    B, C, H, W = grad.shape
    indices = indices.clamp(0, codebook.shape[0] - 1)  # as the forward pass takes them
    tokens = indices.shape[1]
    of_codes = grad.new_empty((B, tokens, C), dtype=torch.float32)
    make = torch.empty if phi_ratio != 0 and of_codes.numel() > 0 else torch.zeros
    new = functools.partial(make, dtype=torch.float32, device=grad.device)
    grad_weight, grad_bias = new(phi_weight.shape), new(phi_weight.shape[:2])
    if of_codes.numel() > 0:
        pyramid = plan(
            *(tuple(scales), tuple(phi_index), (H, W), phi_weight.shape[0]),
            *(grad_per_scale.shape[0] > 0, int(phi_ratio != 0), constants("phi", C)["BLOCK_T"], grad.device),
        )
        maps = max(grad_per_scale.shape[0], 1)
        taps = 3 if phi_ratio != 0 else 1
        floats = (maps * W + taps * pyramid.columns.positions) * H * constants("reach", C)["CP"]
        images = min(max(_WORKSPACE // floats, 1), MAX_GRID)
        bank = _by_taps(phi_weight), phi_ratio
        for first in range(0, B, images):
            some = slice(first, first + images)
            given = grad[some], grad_per_scale[:, some], indices[some], codebook
            _gradients(pyramid, *given, *bank, of_codes[some], grad_weight, grad_bias, more=first > 0)
    return (
        _sums_by_code(indices, of_codes, codebook),
        grad_weight.to(phi_weight.dtype),
        grad_bias.to(phi_weight.dtype),
    )


def _by_taps(phi_weight: Tensor) -> Tensor:
    """`(P, 3, 3, C, C)`, contiguous: the channels of a tap of phi together in memory."""
    return phi_weight.permute(0, 3, 4, 1, 2).contiguous()


def _gradients(
    pyramid: Plan,
    grad: Tensor,
    grad_per_scale: Tensor,
    indices: Tensor,
    codebook: Tensor,
    weight: Tensor,
    phi_ratio: float,
    of_codes: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    more: bool,
) -> None:
    """Of some images: those of each token's code, and those of phi, which are added to if there is `more`."""
    from hitsr_fast.kernels import residual_decode_backward as kernels

    B, C, H, W = grad.shape
    chosen = {kernel: constants(kernel, C) for kernel in _BLOCKS}
    CP, block = chosen["reach"]["CP"], chosen["reach"]["BLOCK_C"]
    columns, rows = pyramid.columns, pyramid.rows
    each, maps = grad_per_scale.shape[0] > 0, max(grad_per_scale.shape[0], 1)
    taps = 3 if phi_ratio != 0 else 1
    new = functools.partial(grad.new_empty, dtype=torch.float32)

    grid = cdiv(H * W, chosen["reach"]["BLOCK_P"]), CP // block, B
    reached, sums = new((maps, B, H * W, CP)), new((maps, B * grid[0], CP))
    kernels._residual_decode_backward_reach_kernel[grid](
        grad, grad_per_scale, reached, sums, maps, H, W, grad.stride(), grad_per_scale.stride(),
        EACH=each, **chosen["reach"],
    )  # fmt: skip
    across = new((B, taps, columns.positions * H, CP))
    grid = cdiv(columns.positions * H, chosen["across"]["BLOCK_P"]), CP // block, B
    kernels._residual_decode_backward_across_kernel[grid](
        reached, *columns, across, columns.positions, H, W, columns.weights.stride(0),
        TAPS=taps, **chosen["across"],
    )  # fmt: skip
    given = across, pyramid.places, *rows, pyramid.tiles
    sizes = indices.shape[1], columns.positions, rows.positions, H, rows.weights.stride(0)
    kernels._residual_decode_backward_codes_kernel[len(pyramid.tiles), CP // block, B](
        *given, weight, of_codes, *sizes, 1 - phi_ratio, phi_ratio, TAPS=taps, **chosen["codes"]
    )
    if phi_ratio == 0:
        return
    blocks = (CP // block) ** 2
    split, slots = shares(pyramid.tiles_of, B, cdiv(_PROGRAMS, 3 * blocks), grad.device)
    partial = new((len(split), 9, CP, CP))
    kernels._residual_decode_backward_phi_kernel[len(split), 3, blocks](
        *given, split, indices, codebook, partial, *sizes, indices.stride(), codebook.stride(),
        **chosen["phi"],
    )  # fmt: skip
    phis = grad_weight.shape[0]
    kernels._residual_decode_backward_weight_kernel[cdiv(9 * CP * CP, chosen["weight"]["BLOCK"]), phis](
        partial, slots, grad_weight, phi_ratio, int(more), **chosen["weight"]
    )
    kernels._residual_decode_backward_bias_kernel[CP // block, phis](
        sums, pyramid.phis, grad_bias, len(pyramid.phis), sums.shape[1], phi_ratio, int(more),
        EACH=each, **chosen["bias"],
    )  # fmt: skip


def _sums_by_code(indices: Tensor, values: Tensor, codebook: Tensor) -> Tensor:
    """The gradient of the codebook: the sum of the values `(B, T, C)` of each code's tokens.

    Tokens are sorted by code, which has one result only, for the sort is stable. Runs of a code are summed
    within chunks; what goes beyond a chunk is left to the next launch, until there is one chunk.
    """
    from hitsr_fast.kernels.residual_decode_backward import _residual_decode_backward_runs_kernel

    K, C = codebook.shape
    out = torch.zeros(codebook.shape, dtype=codebook.dtype, device=codebook.device)
    chosen = constants("runs", C)
    # Sorting takes a pass for each byte of a key.
    key_dtype = torch.int16 if K <= 2**15 else torch.int32
    keys, order = indices.reshape(-1).to(key_dtype).sort(stable=True)
    ordered = True
    while (count := keys.shape[0]) > 0:
        chunks = cdiv(count, chosen["BLOCK_N"])
        next_keys = keys.new_empty(2 * chunks)
        next_values = values.new_empty((2 * chunks, C))
        _residual_decode_backward_runs_kernel[chunks, cdiv(C, chosen["BLOCK_C"])](
            keys, order, values, out, next_keys, next_values, count, K, out.stride(0),
            ORDERED=ordered, **chosen,
        )  # fmt: skip
        if chunks == 1:
            break
        keys, values, ordered = next_keys, next_values, False
    return out
