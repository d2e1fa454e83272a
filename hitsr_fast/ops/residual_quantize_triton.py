"""Triton backend of `residual_quantize`, `residual_decode` and `residual_step`: two kernels a scale."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hitsr_fast import env
from hitsr_fast.backends import Limit, cdiv
from hitsr_fast.ops import nearest_code_triton as nearest
from hitsr_fast.ops.cuda_graphs import Graphs
from hitsr_fast.ops.packed_codebook import LAYOUT, pack_triton, padded_channels
from hitsr_fast.reference.residual_quantize import DecodeCall, QuantizeCall

LIMITS = (Limit("C", 1, 256, "codebook"),)
_WORKSPACE = 2**23  # floats, 32 MiB, of what programs keep for themselves: a second-level cache holds it
_SEARCH_PROGRAMS = 512  # enough to fill a large GPU: more rows are taken in turns,
_UPDATE_PROGRAMS = 1024  # and of fewer the search shares the codes out
_POOLED = 4096  # values that a search of few rows loads at a time: 32 a thread
_POOLED_ALONE = 512  # and the kernel that only pools, whose programs are many
_FEW_ROWS = 4096  # up to which blocks are small
_FEW_PLACES = 2**12  # times parts of the channels, up to which 8 x 8 of them leave half a large GPU idle
_GRAPH_PLACES = 2**13  # of a batch, up to which launching the kernels takes longer than running them


def search_constants(
    channels: int, metric: str, rows: int, places: int, capability: int = 0
) -> dict[str, int]:
    """Block sizes of the search: those of the screen and of the re-check of `nearest_code`, in one program.

    places: of the largest area bin; capability: of `_capability`. A block is re-checked by one program: where
    rows are few, blocks are small. All sizes are such that no stage takes more registers than there are.
    """
    constants = nearest.recheck_constants(channels, metric, 1) | nearest.screen_constants(channels)
    if rows <= _FEW_ROWS or constants["CP"] > 128:
        constants["BLOCK_N"] = 16
    elif constants["CP"] > 32 or capability // 10 == 12:  # for which the compiler spills of larger ones
        constants["BLOCK_N"] = 32
    block = constants["BLOCK_N"]
    at_once = {"BLOCK_R": min(block, 512 // constants["CP"]), "ROWS": 8, "BLOCK_C": 4}
    values = _POOLED if block == 16 else _POOLED // 4  # large blocks need their registers for the screen
    return pool_constants(channels, block, places, values) | constants | at_once


def pool_constants(channels: int, rows: int, places: int, values: int) -> dict[str, int]:
    """Block sizes of the pooling of blocks of rows: a program loads so many values at a time.

    places: of the largest area bin. Small bins are added up by a thread each, for rows and channels are
    enough for all; large ones by 8 or 32 neighbours, which read what lies together.
    """
    lanes = 1 if places <= 16 else 8 if places <= 64 else 32
    together = 16 if lanes == 1 and places > 4 and rows <= 16 else 4
    at_once = rows if lanes == 1 else min(rows, 32 // lanes)
    block = min(padded_channels(channels), max(values // (at_once * lanes * together), 1))
    return {"C": channels, "BLOCK_P": block, "BLOCK_M": at_once, "LANES": lanes, "PLACES": together}


def update_constants(channels: int, phi: bool, places: int) -> dict[str, int]:
    """Block sizes of the update: square blocks of a short border, smaller where none is needed.

    places: of a batch. A block of 8 x 8 interpolates 100 places to convolve 64, one of 4 x 4 36 to convolve
    16: 1.4 times the work in all, but in 4 times the programs, each done in 0.36 of the time.
    """
    padded = padded_channels(channels)
    few = places * cdiv(padded, 32) <= _FEW_PLACES
    blocks = {"ROWS": 4 if few else 8, "COLUMNS": 4 if few else 8} if phi else {"ROWS": 2, "COLUMNS": 8}
    sizes = {"C": channels, "CP": padded, "BLOCK_I": min(padded, 32), "BLOCK_O": min(padded, 32)}
    return sizes | blocks | {"BLOCK_S": 16, "TOGETHER": few}


OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


def search_options(channels: int, block: int) -> dict[str, int]:
    """Options of the search's launch. A third stage of loads takes registers that only small blocks have."""
    stages = {"num_stages": 3} if block == 16 and channels <= 128 else {}
    limit = 168 if block == 16 and channels <= 128 else 255
    return nearest.screen_options(channels) | stages | register_limit(limit)


def update_options(channels: int, phi: bool) -> dict[str, int]:
    """Options of the update's launch. One stage: what it loads in its loop is what it has just stored."""
    return OPTIONS | register_limit(168 if phi and channels <= 64 else 255)


def register_limit(most: int) -> dict[str, int]:
    """The option that limits a thread's registers, where the compiler has it.

    With it, NVIDIA's keeps to the limit; left alone it aims lower, and spills what would have fitted.
    """
    return {"maxnreg": most} if _target() == "cuda" else {}


def _target() -> str:
    """What Triton compiles for: "cuda", "hip", or "" where it interprets."""
    if env.triton_interpret():
        return ""
    from triton.runtime import driver

    return str(driver.active.get_current_target().backend)


def _capability() -> int:
    """The compute capability that Triton compiles for, 120 for 12.0; 0 but for GPUs of NVIDIA."""
    if _target() != "cuda":
        return 0
    from triton.runtime import driver

    return int(driver.active.get_current_target().arch)


@dataclass(frozen=True)
class Scale:
    """One scale: its size, its first token, its phi."""

    h: int
    w: int
    begin: int
    phi: int

    @property
    def end(self) -> int:
        """One beyond its last token."""
        return self.begin + self.h * self.w


def _walk(scales: Sequence[int], phi_index: Sequence[int]) -> list[Scale]:
    walk: list[Scale] = []
    for h, w, phi in zip(scales[::2], scales[1::2], phi_index, strict=True):
        walk.append(Scale(h, w, walk[-1].end if walk else 0, phi))
    return walk


class _Searcher:
    """A packed codebook, searched scale by scale."""

    def __init__(self, call: QuantizeCall) -> None:
        self._metric = call.metric
        self._parts: Sequence[Tensor] = call.parts
        if call.layout != LAYOUT:
            self._parts = pack_triton(call.codebook, call.metric)[1]
        self._size, self._channels = call.codebook.shape
        self._arrived = call.codebook.new_zeros(_SEARCH_PROGRAMS, dtype=torch.int32)  # and 0 after each scale

    def __call__(
        self,
        residual: Tensor,
        scale: Scale,
        indices: Tensor,
        reconstruction: Tensor | None,
        inputs: Tensor | None,
    ) -> None:
        """Codes of a scale into `indices`, and the pooled reconstruction into `inputs` where there is one."""
        from hitsr_fast.kernels.residual_quantize import _residual_quantize_search_kernel

        rows = residual.shape[0] * scale.h * scale.w
        bins = _bins(scale, residual)
        places = bins[-2] * bins[-1]
        constants = search_constants(self._channels, self._metric, rows, places, _capability())
        block, padded, classes = constants["BLOCK_N"], constants["CP"], constants["CLASSES"]
        tiles = self._parts[1].shape[1] // (constants["BLOCK_K"] * constants["PARTS"])
        blocks = cdiv(rows, block)
        most = max(min(_SEARCH_PROGRAMS, _WORKSPACE // ((tiles * classes + padded) * block)), 1)
        # On AMD a barrier does not wait until the stores of all waves can be seen by other programs.
        sharers = 1 if _target() == "hip" else max(most // blocks, 1)
        programs, share = min(blocks, most), cdiv(tiles, sharers)
        shares = cdiv(tiles, share)
        new = functools.partial(indices.new_empty, dtype=torch.float32)
        without = new((0, 1, 1))
        pooled = without if inputs is None else inputs
        map_pooled = without[None] if reconstruction is None else reconstruction
        _residual_quantize_search_kernel[(programs, shares)](
            residual, map_pooled, indices, pooled, *self._parts,
            new(programs * tiles * block * classes),
            new(programs * shares * block * padded),
            new(programs * shares * block * padded, dtype=torch.float16),
            new(programs * shares * block * 3),
            self._arrived, rows, scale.begin, *bins, self._size, self._channels, tiles, share,
            residual.stride(), map_pooled.stride(), indices.stride(), pooled.stride(),
            INPUTS=inputs is not None, SHARED=shares > 1, COSINE=self._metric == "cosine",
            **constants, **search_options(self._channels, block),
        )  # fmt: skip


def _pool(x: Tensor, scale: Scale, rows: Tensor) -> None:
    """Area averages of `x (B, C, H, W)` into `rows (B, h * w, C)`."""
    from hitsr_fast.kernels.residual_quantize import _residual_quantize_pool_kernel

    bins = _bins(scale, x)
    constants = pool_constants(x.shape[1], 64, bins[-2] * bins[-1], _POOLED_ALONE)
    count = x.shape[0] * scale.h * scale.w
    grid = cdiv(count, constants["BLOCK_M"]), cdiv(x.shape[1], constants["BLOCK_P"])
    _residual_quantize_pool_kernel[grid](
        x, rows, count, *bins, x.stride(), rows.stride(), **constants, **OPTIONS
    )


def _bins(scale: Scale, x: Tensor) -> tuple[int, ...]:
    """Sizes of a scale and of a map, and of the largest area bin between them."""
    H, W = x.shape[2:]
    return scale.h, scale.w, H, W, _largest_bin(scale.h, H), _largest_bin(scale.w, W)


def _largest_bin(size: int, length: int) -> int:
    return max(cdiv((i + 1) * length, size) - i * length // size for i in range(size))


class _Updater:
    """The codebook, the phi bank, and what the programs of an update keep for themselves."""

    def __init__(
        self, codebook: Tensor, phi_weight: Tensor, phi_bias: Tensor, phi_ratio: float, places: Tensor
    ) -> None:
        self._codebook, self._weight, self._bias = codebook, phi_weight, phi_bias
        B, _, H, W = places.shape
        # The matrix cores of AMD add in an order of their own for each size of block: there it is one.
        count = _FEW_PLACES + 1 if _target() == "hip" else B * H * W
        self._ratio = phi_ratio
        self._constants = update_constants(codebook.shape[1], phi_ratio != 0, count)
        tall, broad = self._constants["ROWS"], self._constants["COLUMNS"]
        strip = (tall + 2) * (broad + 2) * self._constants["CP"] if phi_ratio != 0 else 0
        self._blocks = B * cdiv(H, tall) * cdiv(W, broad)
        self._blocks *= cdiv(codebook.shape[1], self._constants["BLOCK_O"])
        self._programs = max(min(self._blocks, _UPDATE_PROGRAMS, _WORKSPACE // max(strip, 1)), 1)
        self._strips = codebook.new_empty(self._programs * strip, dtype=torch.float32)

    @classmethod
    def of(cls, call: QuantizeCall | DecodeCall, results: _Results) -> _Updater:
        """With the channels of a tap of phi together in memory: by one copy, where they are not yet."""
        by_taps = call.phi_weight.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        return cls(call.codebook, by_taps, call.phi_bias, call.phi_ratio, results.reconstruction)

    def __call__(
        self,
        scale: Scale,
        indices: Tensor,
        reconstruction: Tensor | None,
        out: Tensor,
        residual: Tensor | None = None,
        residual_out: Tensor | None = None,
    ) -> None:
        """out = reconstruction + f, residual_out = residual - f; the two have the same strides."""
        from hitsr_fast.kernels.residual_quantize import _residual_quantize_update_kernel

        taken = out if residual is None else residual
        _residual_quantize_update_kernel[(self._programs,)](
            indices, self._codebook, self._weight[scale.phi], self._bias[scale.phi], taken,
            out if residual_out is None else residual_out,
            out if reconstruction is None else reconstruction,
            out, self._strips, self._blocks, scale.begin, scale.h, scale.w, *out.shape[2:],
            self._codebook.shape[0], 1 - self._ratio, self._ratio, indices.stride(), self._codebook.stride(),
            self._weight.stride()[1:], self._bias.stride()[1:], taken.stride(), out.stride(),
            PHI=self._ratio != 0, FIRST=reconstruction is None, RESIDUAL=residual_out is not None,
            **self._constants, **update_options(self._codebook.shape[1], self._ratio != 0),
        )  # fmt: skip

    def sum(self, walk: list[Scale], indices: Tensor, out: Tensor) -> None:
        """out = the sum of all scales' f, in one launch."""
        from hitsr_fast.kernels.residual_quantize import _residual_decode_kernel

        _residual_decode_kernel[(self._programs,)](
            indices, self._codebook, self._weight, self._bias, out, self._strips,
            _scale_table(tuple(walk), out.device), self._blocks, len(walk), *out.shape[2:],
            self._codebook.shape[0], 1 - self._ratio, self._ratio, indices.stride(), self._codebook.stride(),
            self._weight.stride(), self._bias.stride(), out.stride(), PHI=self._ratio != 0,
            **self._constants, **update_options(self._codebook.shape[1], self._ratio != 0),
        )  # fmt: skip


@functools.cache  # and for good: a captured graph reads it where it lies
def _scale_table(walk: tuple[Scale, ...], device: torch.device) -> Tensor:
    """int32 `(S, 4)`: first token, h, w and phi of each scale."""
    rows = [(scale.begin, scale.h, scale.w, scale.phi) for scale in walk]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def residual_quantize_triton(*args: Any) -> tuple[Tensor, ...]:
    """As `reference.residual_quantize`; small batches as CUDA graphs."""
    call = QuantizeCall(*args)
    z, rest = call.z, call[1:]
    places = z.shape[0] * z.shape[2] * z.shape[3]
    if not 0 < places <= _GRAPH_PLACES:
        return _quantize(z, call.replay, *rest)
    return _graphs((z, call.replay), *call._replace(replay=None)[1:])


def _quantize(z: Tensor, replay: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """A call whose first two are copied into the buffers of a graph."""
    call = QuantizeCall(z, *rest)
    walk = _walk(call.scales, call.phi_index)
    indices = z.new_empty((z.shape[0], walk[-1].end), dtype=torch.int64)
    replayed = 0
    if replay is not None:
        replayed = replay.shape[1]
        indices[:, :replayed] = replay
    results = _Results.allocate(call, z.shape, walk)
    if z.numel() > 0:
        search = _Searcher(call) if replayed < walk[-1].end else None
        _run(walk, indices, results, _Updater.of(call, results), search, z, replayed)
    return results.reconstruction, indices, results.inputs, results.reconstructions


_graphs = Graphs(_quantize)


def residual_decode_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.residual_decode`."""
    call = DecodeCall(*args)
    walk = _walk(call.scales, call.phi_index)
    results = _Results.allocate(call, (call.indices.shape[0], call.codebook.shape[1], *call.size), walk)
    if results.reconstruction.numel() > 0:
        update = _Updater.of(call, results)
        if call.inputs or call.per_scale:
            _run(walk, call.indices, results, update)
        else:
            update.sum(walk, call.indices, results.reconstruction)
    return results.reconstruction, results.inputs, results.reconstructions


def residual_step_triton(*args: Any) -> Tensor:
    """As `reference.residual_step`."""
    reconstruction, indices, codebook, phi_weight, phi_bias, scale, next_scale, phi_ratio = args
    pooled: Tensor = reconstruction.new_empty((*reconstruction.shape[:2], *next_scale))
    if reconstruction.numel() > 0:
        (this,) = _walk(scale, [0])
        update = _Updater(codebook, phi_weight[None], phi_bias[None], phi_ratio, reconstruction)
        update(this, indices, reconstruction, reconstruction)
        if pooled.numel() > 0:
            (following,) = _walk(next_scale, [0])
            _pool(reconstruction, following, pooled.flatten(2).transpose(1, 2))
    return pooled


@dataclass(frozen=True)
class _Results:
    """What a call returns beside the indices; empty where it was not asked for."""

    reconstruction: Tensor
    inputs: Tensor
    reconstructions: Tensor

    @classmethod
    def allocate(cls, call: QuantizeCall | DecodeCall, shape: Sequence[int], walk: list[Scale]) -> _Results:
        new = functools.partial(call.codebook.new_empty, dtype=torch.float32)
        tokens = walk[-1].end - walk[0].end if call.inputs else 0
        return cls(
            new(shape), new((shape[0], tokens, shape[1])), new((len(walk) if call.per_scale else 0, *shape))
        )


def _run(
    walk: list[Scale],
    indices: Tensor,
    results: _Results,
    update: _Updater,
    search: _Searcher | None = None,
    residual: Tensor | None = None,
    replayed: int = 0,
) -> None:
    """All scales; those from token `replayed` on are searched, where there is a search."""
    left_over = torch.empty_like(results.reconstruction) if search and len(walk) > 1 else None
    before: Tensor | None = None
    for number, scale in enumerate(walk):
        rows = None
        if before is not None and results.inputs.numel() > 0:
            rows = results.inputs[:, scale.begin - walk[0].end : scale.end - walk[0].end]
        if search and residual is not None and scale.begin >= replayed:
            search(residual, scale, indices, before, rows)
        elif before is not None and rows is not None:
            _pool(before, scale, rows)
        after = results.reconstruction
        if results.reconstructions.numel() > 0:
            after = results.reconstructions[number]
        if number + 1 == len(walk):
            left_over = None
        update(scale, indices, before, after, residual, left_over)
        before, residual = after, left_over
    if results.reconstructions.numel() > 0:
        results.reconstruction.copy_(results.reconstructions[-1])
