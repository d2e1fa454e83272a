"""Problems for the residual quantizer, and the rule by which its backends agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import hitsr_fast.reference.residual_quantize as reference
from hitsr_fast.ops import ResidualDecoded, ResidualQuantized
from tests.tolerances import TOLERANCES

Scales = Sequence["int | tuple[int, int]"]


class Bank(NamedTuple):
    codebook: Tensor
    phi_weight: Tensor
    phi_bias: Tensor

    def to(self, dtype: torch.dtype) -> Bank:
        return Bank(*(tensor.detach().to(dtype) for tensor in self))


def bank(K: int = 9, C: int = 3, P: int = 2, dtype: torch.dtype = torch.float64, grad: bool = False) -> Bank:
    """Random codes of order one half, and convolutions that keep a map's size."""
    codebook = torch.randn(K, C, dtype=dtype).mul_(0.5)
    weight = torch.randn(P, C, C, 3, 3, dtype=dtype).mul_((9 * C) ** -0.5)
    bias = torch.randn(P, C, dtype=dtype).mul_(0.5)
    return Bank(*(tensor.requires_grad_(grad) for tensor in (codebook, weight, bias)))


@st.composite
def problems(draw: st.DrawFn, sides: int = 7, scales: int = 4) -> dict[str, Any]:
    """A latent size, some scales within it (the whole size among them now and then), a phi each, a ratio."""
    H, W = draw(st.integers(1, sides)), draw(st.integers(1, sides))
    pairs = st.one_of(st.just((H, W)), st.tuples(st.integers(1, H), st.integers(1, W)))
    chosen = draw(st.lists(pairs, min_size=1, max_size=scales))
    return {
        "size": (H, W),
        "scales": chosen,
        "phi_index": [draw(st.integers(0, 1)) for _ in chosen],
        "phi_ratio": draw(st.sampled_from([0.0, 0.5, 1.0])),
    }


def encode_arguments(problem: dict[str, Any]) -> dict[str, Any]:
    """A problem without its size: what `residual_quantize` takes."""
    return {name: value for name, value in problem.items() if name != "size"}


def pairs_of(scales: Scales) -> list[tuple[int, int]]:
    return [(scale, scale) if isinstance(scale, int) else scale for scale in scales]


def rows(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`(B, C, H, W)` pooled to a size, as rows `(B, h * w, C)`."""
    return F.interpolate(x, size=size, mode="area").flatten(2).transpose(1, 2)


def assert_near(found: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Hold a float32 result to the house rule: at most twice the reference's error, plus a few roundings.

    Args:
        found: to judge.
        exact: the reference in float64.
        plain: the reference in float32.
    """
    assert found.shape == exact.shape
    assert found.dtype == plain.dtype
    if found.numel():
        allowed = 2 * (plain.double() - exact).abs().max() + _few_roundings(exact.abs().max())
        assert (found.double() - exact).abs().max() <= allowed


def assert_decodes(
    found: ResidualQuantized | ResidualDecoded,
    indices: Tensor,
    codes: Bank,
    *,
    scales: Scales,
    phi_index: Sequence[int],
    size: Sequence[int],
    phi_ratio: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Judge every map of a result by the indices: `assert_near` of the reference's decoding.

    Returns:
        `(S, B, C, H, W)` in float64 and in float32: the reconstructions after each scale by the reference.
    """
    flat = [side for pair in pairs_of(scales) for side in pair]
    codes = Bank(*(tensor.cpu() for tensor in codes))
    exact, plain = (
        reference.residual_decode(
            indices.cpu(), *codes.to(dtype), flat, phi_index, size, phi_ratio, True, True
        )
        for dtype in (torch.float64, torch.float32)
    )
    for result, *expected in zip(found[-3:], exact, plain, strict=True):
        if result is not None:
            assert_near(result.cpu(), *expected)
    return exact[2], plain[2]


def assert_agrees(
    found: ResidualQuantized,
    z: Tensor,
    codes: Bank,
    *,
    scales: Scales,
    phi_index: Sequence[int],
    phi_ratio: float = 0.5,
    metric: str = "l2",
    replayed: int = 0,
) -> None:
    """The agreement of backends: each scale is judged given the codes before it, with nothing to cascade.

    In float64 the found codes leave the residual R that the next scale should have pooled to rows r. The
    backend has pooled a residual of its own, to rows within d of r, and its code c is the nearest to those:
    so |r - c| <= |r - e| + 2 d for every code e. d is twice the largest error of the reference's own float32
    rows, plus a few roundings. For the cosine metric the same holds of the scores, which move by d at most.
    """
    z, indices = z.cpu(), found.indices.cpu()
    maps = assert_decodes(
        found, indices, codes, scales=scales, phi_index=phi_index, size=z.shape[2:], phi_ratio=phi_ratio
    )
    codebook = codes.codebook.detach().cpu().double()
    start = 0
    for scale, (h, w) in enumerate(pairs_of(scales)):
        chosen = indices[:, start : start + h * w]
        start += h * w
        if start <= replayed:
            continue
        exact, plain = (
            rows(z.to(m.dtype) - (m[scale - 1] if scale else 0), (h, w)).double().flatten(0, 1) for m in maps
        )
        error = (plain - exact).norm(dim=1).max()
        d = 2 * error + _few_roundings(z.double().norm(dim=1).max() + maps[0].norm(dim=2).max())
        cost = _costs(exact, codebook, metric)
        excess = cost.gather(1, chosen.reshape(-1, 1))[:, 0] - cost.amin(dim=1)
        assert excess.max() <= 2 * d, (
            f"scale {scale}: a code is {excess.max():.3g} from the best, d = {d:.3g}"
        )


def _few_roundings(size: Tensor) -> Tensor:
    return TOLERANCES["few_float32_roundings"].rtol * size


def _costs(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """`(N, K)`: distances, or scores with their sign turned."""
    if metric == "l2":
        return torch.cdist(x, codebook, compute_mode="donot_use_mm_for_euclid_dist")
    norm = codebook.norm(dim=1, keepdim=True)
    return -x @ (codebook / norm.where(norm > 0, torch.ones_like(norm))).T


def assert_as_good(found: ResidualQuantized, expected: ResidualQuantized, z: Tensor) -> None:
    """Of whole pyramids, where a flipped code may change all later ones: 99.9 % of codes, and the error."""
    assert (found.indices == expected.indices).double().mean() >= 0.999
    errors = [(out.reconstruction - z).double().square().mean().sqrt() for out in (found, expected)]
    assert errors[0] <= errors[1] * (1 + 1e-4)
