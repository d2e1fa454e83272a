"""`sample_codes`: guidance, top-k, top-p and a reproducible draw, from logits to codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import hitsr_fast.reference.sample_codes as reference
from hitsr_fast.backends import UP_TO_FLOAT32, Launch, Native, native
from hitsr_fast.checks import (
    FLOATING,
    INDEX,
    MAX_INT,
    check_generator,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
    has_values,
)
from hitsr_fast.dispatch import op
from hitsr_fast.ops import sample_codes_triton as triton

MAX_CODES = 2**20  # so that sums of weights stay below 2^61 with room to spare


def sample_codes(
    logits: Tensor,
    *,
    uncond_logits: Tensor | None = None,
    guidance: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one code a row: guidance, temperature, top-k, top-p, and a draw; or the largest, with `top_k=1`.

    With `x = (1 + guidance) * logits - guidance * uncond_logits`: of the k largest, those are dropped that
    hold, together with all smaller ones, a share of `softmax(x / temperature)` of at most `1 - top_p`; one of
    the rest is drawn.

    Args:
        logits: float16, bfloat16 or float32, `(..., V)`, V from 1 to 2^20. Any strides.
        uncond_logits: of the same shape, of those dtypes; not read where `guidance` is 0.
        guidance: strength of classifier-free guidance, at least 0.
        top_k: keep the k largest logits and all that equal the least of them; 0 keeps all, and 1 is greedy:
            the lowest index of the largest.
        top_p: of what top-k left, keep the largest logits, with a share of `top_p` and no more than it takes;
            equal logits stay or go together, and the largest always stays. 1 keeps all, and so does 0, VAR's
            way of saying it.
        temperature: divides the logits, from 1e-30 to 1e30.
        generator: source of seed and offset, two draws from [0, 2^63); the default one of the logits' device.
            A generator of the CPU gives the same codes on every device. Not used when greedy.

    Returns:
        int64 `(...)`.

    Raises:
        TypeError: logits or uncond_logits are not a tensor of those dtypes, or an option is of another type.
        ValueError: a shape, device or option does not fit.

    Notes:
        Every backend returns the same codes for the same logits and seed: after float32 operations that round
        the same everywhere all is in integers (docs/ops/sample_codes.md). Row r takes Philox block r, so a
        row's code depends on its place.
        NaN counts as -infinity; of several infinite logits any may be drawn.
        Gradient: none (the result is integer).
        Backends: triton (V up to 16384), cpu, reference.
        Source: VAR (arXiv 2404.02905), its `sample_with_top_k_top_p_`; Philox 4x32-10 (Salmon et al., 2011).

    Example:
        >>> logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
        >>> sample_codes(logits, top_k=1)
        tensor([1])
        >>> sample_codes(logits.expand(6, 4), top_k=2, generator=torch.Generator().manual_seed(0))
        tensor([1, 1, 2, 2, 1, 1])
    """
    check_tensor("logits", logits, UP_TO_FLOAT32)
    if logits.dim() == 0 or not 1 <= logits.shape[-1] <= MAX_CODES:
        raise ValueError(
            f"logits: expected shape (..., V) with V from 1 to {MAX_CODES}, found {tuple(logits.shape)}"
        )
    check_number("guidance", guidance, 0)
    check_integer("top_k", top_k, 0, MAX_INT)
    check_number("top_p", top_p, 0, 1)
    check_number("temperature", temperature, 1e-30, 1e30)
    check_generator(generator)
    if uncond_logits is not None:
        check_tensor("uncond_logits", uncond_logits, UP_TO_FLOAT32, like=logits)
        if uncond_logits.shape != logits.shape:
            raise ValueError(
                f"uncond_logits: expected shape {tuple(logits.shape)}, found {tuple(uncond_logits.shape)}"
            )
    elif guidance != 0:
        raise ValueError(f"uncond_logits: expected a tensor where guidance is {guidance}, found None")
    state = None if top_k == 1 else random_state(logits.device, generator)
    uncond = uncond_logits if guidance > 0 else None
    codes: Tensor = _sample(logits, uncond, state, guidance, top_k, top_p, temperature, None)
    return codes


def random_state(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Seed and offset of one call, int64 `(2,)` on `device`: two draws of a generator, which moves on."""
    source = device if generator is None else generator.device
    drawn = torch.randint(2**63 - 1, (2,), generator=generator, device=source)
    return drawn.to(device)


def sampling_settings(
    guidance: Sequence[float], top_k: int, top_p: float, temperature: float, device: torch.device
) -> Tensor:
    """The op's `settings` for some calls, int64 `(calls, 5)` on `device`; the caller does not wait for it."""
    settings = reference.packed(guidance, top_k, top_p, temperature)
    if device.type == "cuda" and has_values(settings):
        settings = settings.pin_memory()
    return settings.to(device, non_blocking=True)


def _check(logits: Tensor, uncond_logits: Tensor | None, state: Tensor | None, *rest: Any) -> None:
    if state is not None:
        check_tensor("state", state, INDEX, like=logits)
        check_shape("state", state, "words", words=2)
    settings = rest[-1]
    if settings is not None:
        check_tensor("settings", settings, INDEX, like=logits)
        check_shape("settings", settings, "words", words=5)


def _cpu(*args: Any) -> Tensor:
    logits, uncond_logits, state, guidance, top_k, top_p, temperature, settings = args
    factors = [1 + guidance, guidance, reference.power_scale(temperature)]
    others = [top_k, reference.dropped_fraction(top_p)]
    if settings is not None:
        factors, others = (part.tolist() for part in reference.unpacked(settings))

    def rows(values: Tensor) -> Tensor:
        return values.float().reshape(-1, values.shape[-1]).contiguous()

    codes: Tensor = native(
        "_sample_codes",
        *(rows(logits), None if uncond_logits is None else rows(uncond_logits)),
        *(state, *factors, *others),
    )
    return codes.view(logits.shape[:-1])


@op(
    "sample_codes(Tensor logits, Tensor? uncond_logits, Tensor? state, float guidance, int top_k, "
    "float top_p, float temperature, Tensor? settings) -> Tensor",
    reference=reference.sample_codes,
    triton=Launch(triton.sample_codes_triton, dtypes=FLOATING, limits=triton.LIMITS),
    native=Native("_sample_codes", run=_cpu),
    check=_check,
    integer=True,
)
def _sample(logits: Tensor, *_rest: Any) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)
