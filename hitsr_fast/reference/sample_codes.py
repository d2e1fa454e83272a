"""Definition of drawing codes from logits: guidance, top-k, top-p and a draw that is the same everywhere.

Weights come from float32 operations that round the same on every device; from there on all is in integers,
whose sums do not depend on their order. So every backend finds the same codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WEIGHT_BITS = 30  # the weight of a row's largest logit is 2^30
LOWEST_POWER = -40.0  # 2 to it is far below a weight of one
NEAREST = 1.5 * 2.0**23  # added to a float32 below 2^22 and taken off again, it leaves the nearest integer

# 2^f as a Taylor series of degree 6: for |f| <= 1/2 it is off by less than 2^-21 of the value.
POWER_SERIES = tuple(math.log(2) ** n / math.factorial(n) for n in range(7))

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def sample_codes(
    logits: Tensor,
    uncond_logits: Tensor | None,
    state: Tensor | None,
    guidance: float,
    top_k: int,
    top_p: float,
    temperature: float,
    settings: Tensor | None = None,
) -> Tensor:
    """One code a row, int64 `(...)`.

    Arguments are those of `ops.sample_codes`, but for two. `state`: int64 `(2,)`, seed and offset of the
    random numbers, or None, which is greedy. `settings`: int64 `(5,)`, what the four numbers amount to (see
    `packed`), in their place; nobody looks at it.
    """
    cond: float | Tensor = 1 + guidance
    uncond: float | Tensor = guidance
    scale: float | Tensor = power_scale(temperature)
    kept: int | Tensor = top_k
    dropped: int | Tensor = dropped_fraction(top_p)
    if settings is not None:
        factors, others = unpacked(settings)
        (cond, uncond, scale), (kept, dropped) = factors.unbind(), others.unbind()
    x = guided(logits, uncond_logits, cond, uncond).reshape(-1, logits.shape[-1])
    if state is None:
        return _first_largest(x).view(logits.shape[:-1])
    weights = code_weights(x, scale)
    if isinstance(kept, Tensor) or 0 < kept < x.shape[1]:
        weights = weights.where(x >= _least_kept(x, kept), 0)
    if isinstance(dropped, Tensor) or dropped > 0:
        ascending, order = x.sort(dim=1)
        share = weights.gather(1, order).cumsum(1)
        limit = fraction(share[:, -1:], *split(dropped))
        least = ascending.gather(1, (share <= limit).sum(1, keepdim=True))
        weights = weights.where(x >= least, 0)
    share = weights.cumsum(1)
    drawn = fraction(share[:, -1], *random_fractions(state, len(x)))
    return (share <= drawn[:, None]).sum(1).view(logits.shape[:-1])


def packed(guidance: Sequence[float], top_k: int, top_p: float, temperature: float) -> Tensor:
    """The numbers of some calls as the op reads them from memory, int64 `(calls, 5)`.

    A row is the bits of three float32, `1 + guidance`, `guidance` and `log2(e) / temperature`; then `top_k`,
    and `1 - top_p` in units of 2^-62.
    """
    scale = power_scale(temperature)
    factors = torch.tensor([(1 + strength, strength, scale) for strength in guidance], dtype=torch.float32)
    others = torch.tensor([top_k, dropped_fraction(top_p)]).expand(len(factors), 2)
    return torch.cat([factors.view(torch.int32), others], dim=1)


def unpacked(settings: Tensor) -> tuple[Tensor, Tensor]:
    """Of a row of `packed` the three factors, float32, and the other two."""
    return settings[:3].to(torch.int32).view(torch.float32), settings[3:]


def guided(
    logits: Tensor, uncond_logits: Tensor | None, cond: float | Tensor, uncond: float | Tensor
) -> Tensor:
    """float32 `cond * logits - uncond * uncond_logits`, each step rounded; NaN is -infinity."""
    x = logits.float()
    if uncond_logits is not None:
        x = x * cond - uncond_logits.float() * uncond
    return x.where(x == x, -torch.inf)


def code_weights(x: Tensor, scale: float | Tensor) -> Tensor:
    """int64 `floor(2^(30 + (x - max x) * scale))` of rows `(N, V)`, by a series; see `power_scale`."""
    largest = x.amax(1, keepdim=True)
    scaled = (x - largest) * scale
    scaled = scaled.where(x != largest, 0.0).clamp(min=LOWEST_POWER)
    whole = scaled + NEAREST - NEAREST
    part = scaled - whole
    power = torch.full_like(part, POWER_SERIES[-1])
    for factor in reversed(POWER_SERIES[:-1]):
        power = power * part + factor
    exponent = whole.to(torch.int32) + (127 + WEIGHT_BITS) << 23
    return (power * exponent.view(torch.float32)).to(torch.int64)


def dropped_fraction(top_p: float) -> int:
    """`1 - top_p` in units of 2^-62, less than one whole so that the largest logit stays; of 0, which keeps
    all, as of 1."""
    return min(int((1.0 - top_p) * 2.0**62), 2**62 - 1) if top_p > 0 else 0


def split(fraction: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    """The upper and the lower 31 bits."""
    return fraction >> 31, fraction & 2**31 - 1


def fraction(total: Tensor, high: Tensor | int, low: Tensor | int) -> Tensor:
    """`floor(total * (high 2^31 + low) / 2^62)` for totals below 2^61, in 64-bit integers."""
    upper, lower = total >> 31, total & 2**31 - 1
    return upper * high + (upper * low + lower * high + (lower * low >> 31) >> 31)


def random_fractions(state: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 31 bits `(rows,)` of a random fraction for each row: two words of its Philox block."""
    seed, offset = state.unbind()
    row = torch.arange(rows, device=state.device)
    counter = (offset & _WORD, offset >> 32 & _WORD, row, torch.zeros_like(row))
    words = philox(counter, (seed & _WORD, seed >> 32 & _WORD))
    return words[0] >> 1, words[1] >> 1


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 (Salmon et al., SC 2011), on 32-bit words that are held in int64."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]  # modulo 2^64, in two's complement
        a, b = (right >> 32 & _WORD) ^ b ^ k0, right & _WORD
        c, d = (left >> 32 & _WORD) ^ d ^ k1, left & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return a, b, c, d


def power_scale(temperature: float) -> float:
    """The float32 nearest to `log2(e) / temperature`: what makes differences of logits powers of two."""
    return float(torch.tensor(math.log2(math.e) / temperature, dtype=torch.float32))


def _least_kept(x: Tensor, top_k: int | Tensor) -> Tensor:
    """The k-th largest of each row, `(N, 1)`; the least where k is 0 or at least their number."""
    if isinstance(top_k, int):
        return x.topk(top_k, dim=1).values[:, -1:]
    V = x.shape[1]
    left_out = (V - top_k).where((top_k > 0) & (top_k < V), 0)
    return x.sort(dim=1).values.index_select(1, left_out.view(1))


def _first_largest(x: Tensor) -> Tensor:
    """The lowest index of a row's largest value; `argmax` alone promises none of those that are equal."""
    places = torch.arange(x.shape[1], device=x.device)
    return places.where(x == x.amax(1, keepdim=True), x.shape[1]).amin(1)
