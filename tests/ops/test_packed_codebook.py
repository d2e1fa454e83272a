"""The packed codebook of the Triton and CUDA backends: its parts, and that its bounds are bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hitsr_fast.ops.nearest_code_triton import nearest_code_triton
from hitsr_fast.ops.packed_codebook import CLASSES, MEMBERS, TILE, pack_eager, pack_triton
from tests.ops.backends import placed
from tests.ops.test_nearest_code import KINDS, problem

METRICS = ("l2", "cosine")
pytestmark = pytest.mark.backends("triton")


def in_order(values: Tensor) -> Tensor:
    """`(128 T, ...)` of a tile's order in that of the codebook."""
    tiles = values.view(-1, MEMBERS // 2, CLASSES, 2, *values.shape[1:])
    return tiles.transpose(1, 2).reshape(values.shape)


def unit_vectors(codes: Tensor) -> Tensor:
    """In float64 by NumPy, whose roots are rounded as IEEE 754 has it."""
    wide = codes.double().cpu().numpy()
    energy = np.zeros(len(wide))
    for channel in wide.T:
        energy += channel * channel
    vectors = wide / np.where(energy > 0, np.sqrt(energy), 1.0)[:, None]
    return torch.from_numpy(vectors).to(codes.device)


def check(codebook: Tensor, metric: str) -> None:
    """Of one group, against float64."""
    K, C = codebook.shape
    mean, codes, half_norms, exact, bounds = (part[0] for part in pack_triton(codebook, metric)[1])
    assert len(codes) == len(half_norms) == -(-K // TILE) * TILE
    cosine = metric == "cosine"
    wanted = unit_vectors(codebook) if cosine else codebook.float()
    given = exact.transpose(1, 2).reshape(-1, C)
    assert torch.equal(given[:K], wanted) and not given[K:].any()

    before, after, longest, lost, longest_given = bounds.double()
    assert before <= 1 <= after and all(torch.frexp(factor).mantissa == 0.5 for factor in (before, after))
    kept, norms = in_order(codes).double(), in_order(half_norms).double()
    assert not kept[K:].any() and not kept[:, C:].any() and norms[K:].isposinf().all()
    assert not ((kept != 0) & (kept.abs() < 2.0**-14)).any() and kept.abs().max() < 2.0**14.01
    kept, norms = kept[:K, :C], norms[:K]
    centred = wanted.double() * (before * after)
    if cosine:
        assert not mean.any() and not norms.any()
        assert longest_given >= before * after
        # Around what they are centred is not kept: it drops out of differences.
        apart = (centred - centred[:1]) - (kept - kept[:1])
        assert apart.norm(dim=1).max() <= 2 * lost
        assert (centred - centred.mean(0)).norm(dim=1).max() <= 2 * longest
    else:
        centred -= mean.double() * after
        length, dropped = centred.norm(dim=1), (centred - kept).norm(dim=1)
        assert length.max() <= longest <= length.max() * (1 + 2.0**-9) + 2.0**-49
        assert dropped.max() <= lost <= dropped.max() * (1 + 2.0**-8) + 2.0**-21 * longest + 2.0**-49
        assert longest_given == longest
        half = centred.square().sum(1) / 2
        assert ((norms - half).abs() <= (C + 4) * 2.0**-24 * half).all()
    if wanted.double().std(0).max() > 1e-3 * wanted.double().abs().max():  # not all alike
        assert kept.abs().max() >= 2.0**12


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_bounds(backend: str, kind: str, metric: str) -> None:
    for codes, channels in ((150, 5), (40, 33), (1, 1)):
        _, codebook = placed(*problem(kind, 1, codes, channels))
        check(codebook, metric)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_groups_and_strides(backend: str, dtype: torch.dtype) -> None:
    (codebook,) = placed(torch.randn(5, 33, 2).to(dtype).permute(2, 1, 0))
    whole = pack_triton(codebook, "l2")[1]
    for group in range(2):
        check(codebook[group], "l2")
        for part, alone in zip(whole, pack_triton(codebook[group].contiguous(), "l2")[1], strict=True):
            assert torch.equal(part[group], alone[0])
    assert [part.shape for part in whole] == [part.shape for part in pack_eager(codebook, "l2")[1]]
    assert [part.dtype for part in whole] == [part.dtype for part in pack_eager(codebook, "l2")[1]]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_indices_lie_within_a_codebook_that_is_not_finite(backend: str, metric: str, bad: float) -> None:
    """Nobody looks at values on a GPU, so the launcher has to stand it."""
    x, codebook = placed(torch.randn(9, 3), torch.randn(70, 3))
    codebook[40, 1] = bad
    found = nearest_code_triton(x, codebook, [], "", metric)
    assert ((found >= 0) & (found < len(codebook))).all()
