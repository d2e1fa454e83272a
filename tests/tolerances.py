"""The one table of tolerances. A test names its entry; no variable and no option can loosen it."""

from __future__ import annotations

from typing import NamedTuple


class Tolerance(NamedTuple):
    """Accepts |actual - expected| up to `atol + rtol * |expected|`; use as `**TOLERANCES[name]._asdict()`."""

    rtol: float
    atol: float


TOLERANCES: dict[str, Tolerance] = {
    # Two float64 evaluations of the same formula that differ in the order of their sums.
    "float64_reordered": Tolerance(rtol=1e-10, atol=1e-12),
    # The same for float32: sums of at most a few thousand terms of order one.
    "float32_reordered": Tolerance(rtol=1e-4, atol=1e-5),
    # What float32 may lose beside an error that is measured: sixteen units in the last place (2^-24) of the
    # largest value, for results that the measured side happens to hit exactly.
    "few_float32_roundings": Tolerance(rtol=2.0**-20, atol=0.0),
    # Normalised float32 rows of deviation one about a mean of 100, which float32 knows to some 2^-17, times a
    # random scale.
    "mean_of_100": Tolerance(rtol=1e-4, atol=2e-4),
    # The same about a mean of 1000, and gradients: that mean is known to some 2^-13.
    "mean_of_1000": Tolerance(rtol=1e-4, atol=1e-3),
    # bfloat16 results of order one: a few units in the last place (2^-8).
    "bfloat16": Tolerance(rtol=2e-2, atol=2e-2),
    # float16 results of order one: a few units in the last place (2^-11).
    "float16": Tolerance(rtol=4e-3, atol=4e-3),
    # Logarithm of a sum of weights that are off by 2^-13 at most, plus rounding of scores of a few hundred.
    "float32_lse": Tolerance(rtol=2.0**-20, atol=2.0**-13),
    # Loss and gradients, over their largest value, of a micro model in float32, against float64.
    "float32_training": Tolerance(rtol=1e-4, atol=1e-4),
    # Losses of a training from its start, by kernels and by the reference: order of sums, grown by the
    # steps between. Where codes are looked up one at a near tie may be chosen otherwise, even at the first
    # step (one of 520 tokens, loss 5e-4 off, on a CPU with AVX2), and what follows differs with it.
    "loss_of_10_steps": Tolerance(rtol=1e-4, atol=0.0),
    "loss_of_10_steps_by_codes": Tolerance(rtol=1e-3, atol=0.0),
    "loss_of_200_steps": Tolerance(rtol=1e-2, atol=0.0),
    # torch.autograd.gradcheck in float64 with its default step of 1e-6.
    "gradcheck": Tolerance(rtol=1e-3, atol=1e-5),
    # Mean over an image of |ours - libjpeg's|, in [0, 1]: a coefficient may be rounded the other way.
    "jpeg_mean": Tolerance(rtol=0.0, atol=1.5 / 255),
    # The same after two orders of degradation, where a step of one JPEG moves the next.
    "degraded_mean": Tolerance(rtol=0.0, atol=5 / 255),
    # Shares counted over 2000 random draws: four standard deviations of a fair coin.
    "share_of_2000": Tolerance(rtol=0.0, atol=0.045),
    # Mean and standard deviation of noise over 10^5 pixels, and what the Poisson approximation adds.
    "noise_moments": Tolerance(rtol=0.05, atol=0.02),
    # Mean colour of a cell of a golden image, in [0, 255]: a few codes may flip by rounding.
    "golden_cells": Tolerance(rtol=0.0, atol=3.0),
}
