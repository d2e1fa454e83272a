"""Definition of `nearest_code`: exact codebook search by a float64 screen and a direct re-check."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# 128 rows against 4096 codes is a 4 MiB float64 screen: small enough to stay in cache.
_ROWS_PER_CHUNK = 128
_UNIT_ROUNDOFF = 2.0**-53


def nearest_code(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """Index of the nearest code of each row, as if every distance had been computed in float64.

    Arguments and result are those of `ops.nearest_code`, but for maps. "l2" minimises `sum_c (x_c - e_c)^2`,
    "cosine" minimises `-sum_c x_c u_c` with `u = e / |e|` (a zero code keeps u = 0). Both sums run in
    float64, channel by channel in order; that order is part of the definition, for it decides ties that exist
    only by rounding. The screen, a matrix product whose order of summation is the library's own, only
    discards codes that provably cannot win (see `_search_rows`): how rows are cut into chunks does not count.
    """
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    if x.dim() == 3:
        for group in range(x.shape[0]):
            indices[group] = nearest_code(x[group], codebook[group], metric)
        return indices
    codes = codebook.double()
    if metric == "cosine":
        norm = root(_sum_channels(codes * codes))
        codes = codes / torch.where(norm > 0, norm, 1.0)[:, None]
    for start in range(0, x.shape[0], _ROWS_PER_CHUNK):
        rows = slice(start, start + _ROWS_PER_CHUNK)
        indices[rows] = _search_rows(x[rows].double(), codes, metric)
    return indices


def _search_rows(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """Winners `(n,)` of float64 rows `(n, C)` among float64 codes `(K, C)`.

    The screen is `s_k = |e_k|^2 / 2 - x.e_k`, half the squared distance less a term of the row alone.
    With u = 2^-53, E = max |e_k| and R = (|x| + E)^2, to first order in u: rounding moves s by at most
    (2C+1) u R / 2 whatever the order of its sums, and a directly summed distance by at most (C+2) u R. So the
    code of least direct distance, and every code that ties with it, has s within (3C+3) u R of the least s.
    For cosine s is the direct sum in another order: with R = |x| both move by at most C u R, and the winners
    lie within 4 C u R. The slack is 4 (C+4) u R; the rest of it covers the higher orders and the rounding of
    R, and `tiny` covers underflow.
    """
    finite = x.isfinite().all(dim=1)
    x = torch.where(finite[:, None], x, 0.0)
    channels = x.shape[1]
    length = torch.linalg.vector_norm(x, dim=1)
    if metric == "l2":
        screen = torch.addmm((codes * codes).sum(dim=1) / 2, x, codes.T, alpha=-1)
        reach = (length + torch.linalg.vector_norm(codes, dim=1).amax()).square()
    else:
        screen = (-x) @ codes.T
        reach = length
    slack = 4 * (channels + 4) * _UNIT_ROUNDOFF * reach + torch.finfo(torch.float64).tiny
    limit = screen.amin(dim=1) + slack
    # "not above" rather than "at most": should a score overflow to NaN, its code stays a candidate.
    row, code = (screen > limit[:, None]).logical_not_().nonzero(as_tuple=True)
    if row.numel() > x.shape[0]:
        row, code = _decide(x, codes, row, code, metric)
    return torch.where(finite, code, 0)


def _decide(x: Tensor, codes: Tensor, row: Tensor, code: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """For each row, the lowest of its candidate codes of least direct distance; one pair per row."""
    rows = x.shape[0]
    distance = torch.zeros(row.shape, dtype=x.dtype, device=x.device)
    for channel in range(x.shape[1]):
        a, b = x[row, channel], codes[code, channel]
        distance += (a - b).square() if metric == "l2" else -(a * b)
    least = distance.new_full((rows,), torch.inf).scatter_reduce(0, row, distance, "amin")
    loser = distance > least[row]
    winner = code.masked_fill(loser, codes.shape[0])
    lowest = torch.full((rows,), codes.shape[0], dtype=code.dtype, device=code.device)
    return torch.arange(rows, device=row.device), lowest.scatter_reduce(0, row, winner, "amin")


def root(x: Tensor) -> Tensor:
    """The square root of float64 as IEEE 754 rounds it; PyTorch's own is MKL's on some CPUs, and differs."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


def _sum_channels(terms: Tensor) -> Tensor:
    """`(n, C)` -> `(n,)`, added channel by channel in order."""
    total = torch.zeros_like(terms[:, 0])
    for channel in range(terms.shape[1]):
        total += terms[:, channel]
    return total
