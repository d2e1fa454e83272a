"""The packed codebook of the Triton and CUDA backends: its layout, and what makes it."""

from __future__ import annotations

import torch
from torch import Tensor

from hitsr_fast.backends import cdiv
from hitsr_fast.reference.nearest_code import root

LAYOUT = "triton"
TILE = 128  # codes that a turn of the screen's loop takes
CLASSES = 4  # of a tile; each is kept or dropped as a whole
MEMBERS = TILE // CLASSES

_RANGE_PROGRAMS = (
    32  # that share out the codes of a channel; each of the packing programs reads what they leave
)
# The definition's unit vectors multiply and add in two steps.
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


def padded_channels(channels: int) -> int:
    """Channels of the packed codes: a power of two, as are all Triton blocks, and 16 at least for its dot."""
    return max(16, 1 << (channels - 1).bit_length())


def pack_triton(codebook: Tensor, metric: str) -> tuple[str, tuple[Tensor, ...]]:
    """Name of the layout and the packed form of a codebook, `(K, C)` or `(G, K, C)`: two launches, no wait.

    With tiles T = ceil(K / 128) and C padded to CP, the parts are
        mean: float32 `(G, C)`, what the screen takes off rows multiplied by `before`; 0 for cosine.
        codes: float16 `(G, 128 T, CP)`, centred, scaled, and put where the screen wants a tile's codes.
        half_norms: float32 `(G, 128 T)`, of the centred, scaled codes (0 for cosine), infinite for padding.
        exact: `(G, 4 T, C, 32)`, by classes, float32 as given, or float64 unit vectors for cosine.
        bounds: float32 `(G, 5)`: the scale as two factors, `before` at most and `after` at least 1; and, all
            scaled, the lengths of the longest centred code, of the most that rounding took from one, and of
            the longest vector that the definition multiplies by.
    Of a codebook with NaN or infinity they are such that indices mean nothing, and lie within it.
    """
    from hitsr_fast.kernels.pack_codebook import _pack_codebook_kernel, _pack_codebook_ranges_kernel

    given = codebook if codebook.dim() == 3 else codebook[None]
    groups, size, channels = given.shape
    cosine, padded = metric == "cosine", padded_channels(channels)
    classes, taken = CLASSES * cdiv(size, TILE), cdiv(size, MEMBERS)
    programs, block = min(taken, _RANGE_PROGRAMS), min(padded, 32)
    blocks = {"COSINE": cosine, "C": channels, "BLOCK_C": block, "MEMBERS": MEMBERS}

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=codebook.device)

    ranges, bounds = new(groups, programs, 3, channels), new(groups, 5)
    mean = new(groups, channels)
    codes = new(groups, classes * MEMBERS, padded, dtype=torch.float16)
    half_norms = new(groups, classes * MEMBERS)
    exact = new(groups, classes, channels, MEMBERS, dtype=torch.float64 if cosine else torch.float32)
    parts = mean, codes, half_norms, exact, bounds
    if groups == 0:
        return LAYOUT, parts
    with torch.cuda.device_of(codebook):
        _pack_codebook_ranges_kernel[(programs, cdiv(channels, block), groups)](
            given, ranges, bounds, size, taken, 1 / size, given.stride(), **blocks, **_OPTIONS
        )
        _pack_codebook_kernel[(classes, groups)](
            given, ranges, *parts, bounds.view(torch.int32), size, classes, programs, given.stride(),
            **blocks, CP=padded, CLASSES=CLASSES, PROGRAMS=_RANGE_PROGRAMS, **_OPTIONS,
        )  # fmt: skip
    return LAYOUT, parts


def pack_eager(codebook: Tensor, metric: str) -> tuple[str, tuple[Tensor, ...]]:
    """As `pack_triton`, for the CUDA backend where Triton is not: some forty launches of PyTorch's.

    Bits differ: it centres on the mean of all codes in float64.
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

    tiles = cdiv(size, TILE)
    codes = kept.new_zeros(groups, tiles * TILE, padded_channels(channels))
    codes[:, :size, :channels] = kept
    half_norms = centred.new_full((groups, tiles * TILE), torch.inf)
    half_norms[:, :size] = 0 if cosine else centred.square().sum(dim=2) / 2
    exact = given.new_zeros((groups, tiles * TILE, channels), dtype=given.dtype if cosine else torch.float32)
    exact[:, :size] = given
    exact = exact.view(groups, tiles * CLASSES, MEMBERS, channels)
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
    return codes / torch.where(energy > 0, root(energy), 1.0)[..., None]


def _scale(length: Tensor) -> Tensor:
    """Power of two `(G,)` that brings a length `(G,)` into [2^13, 2^14), or as near as float32 can tell."""
    exponent = (14 - torch.frexp(length).exponent).clamp(-126, 126)
    return (exponent.long() + 1023 << 52).view(torch.float64)  # its bits: exact on every device


def _in_classes(codes: Tensor) -> Tensor:
    """`(G, 128 T, ...)`: of eight neighbours in a tile, the screen takes two for each of its four classes.

    A class is thus 32 neighbours of the codebook.
    """
    pairs = MEMBERS // 2
    tiles = codes.view(codes.shape[0], -1, CLASSES, pairs, 2, codes.shape[-1])
    return tiles.transpose(2, 3).reshape(codes.shape)
