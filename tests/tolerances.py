"""The one table of tolerances. A test names its entry; no environment variable or command line can loosen it."""

from __future__ import annotations

from typing import NamedTuple


class Tolerance(NamedTuple):
    """Largest accepted |actual - expected| is `atol + rtol * |expected|`; pass as `**TOLERANCES[name]._asdict()`."""

    rtol: float
    atol: float


TOLERANCES: dict[str, Tolerance] = {
    # Two float64 evaluations of the same formula that differ in the order of their sums.
    "float64_reordered": Tolerance(rtol=1e-10, atol=1e-12),
    # The same for float32: sums of at most a few thousand terms of order one.
    "float32_reordered": Tolerance(rtol=1e-4, atol=1e-5),
    # bfloat16 results of order one: a few units in the last place (2^-8).
    "bfloat16": Tolerance(rtol=2e-2, atol=2e-2),
    # torch.autograd.gradcheck in float64 with its default step of 1e-6.
    "gradcheck": Tolerance(rtol=1e-3, atol=1e-5),
}
