"""Faults that losses of a plausible size hide, planted one by one: the checks of the tasks find each.

That averaged weights are not used is found in `test_trainer`; that Muon does not run, in `test_optim` too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hitsr_fast.train.draw import Draw
from hitsr_fast.train.tasks import base, next_scale, tokenize
from tests.train import task_checks as checks
from tests.train.test_tasks import transformer_rule

Patch = pytest.MonkeyPatch


def labels_as_inputs(patch: Patch) -> None:
    """Teacher forcing on the labels, not on the tokens with mistakes that they mend."""
    original = next_scale.tokenize_with_mistakes
    patch.setattr(
        next_scale, "tokenize_with_mistakes", lambda *args, **options: (original(*args, **options)[0],) * 2
    )


def equal_token_weights(patch: Patch) -> None:
    patch.setattr(next_scale, "token_loss", lambda entropy, weights: entropy.mean(1))


def muon_off(patch: Patch) -> None:
    patch.setattr(base.HitTask, "_is_block_matrix", lambda self, name: False)


def preference_of_the_rejected(patch: Patch) -> None:
    original = next_scale.preference_loss
    patch.setattr(next_scale, "preference_loss", lambda gap, **options: original(-gap, **options))


def no_latent_noise(patch: Patch) -> None:
    original = Draw.normal
    patch.setattr(
        Draw, "normal", lambda self, stream, *shape: 0 * original(self, stream, *shape)
    )  # the formula draws too: see `check_noise`


def no_commitment(patch: Patch) -> None:
    original = tokenize.codebook_loss
    patch.setattr(tokenize, "codebook_loss", lambda q, z, commitment: original(q, z, 0.0))


def no_preference(patch: Patch) -> None:
    patch.setattr(next_scale, "preference_loss", lambda gap, **options: torch.zeros(len(gap)))


def frozen_codebook(patch: Patch) -> None:
    original = tokenize.codebook_loss
    patch.setattr(tokenize, "codebook_loss", lambda q, z, commitment: original(q.detach(), z, commitment))


def degraded_class_dropped_to(patch: Patch) -> None:
    """Dropped images are told to be clean ones, not of no class."""
    original: Callable[..., Tensor] = next_scale.NextScale._partly_free
    patch.setattr(
        next_scale.NextScale,
        "_partly_free",
        lambda self, class_id, draw: original(self, class_id, draw).clamp_max(1),
    )


def seed_ignored(patch: Patch) -> None:
    original = Draw._words
    patch.setattr(
        Draw,
        "_words",
        lambda self, stream, shape: original(Draw(0, self.phase, self.index, self.device), stream, shape),
    )


def check_noise() -> None:
    """The loss depends on the strength of the noise on the latent."""
    batch = checks.samples()
    losses = [
        checks.make(checks.AUTOENCODE, latent_noise=noise)(batch, checks.draw_of(batch)).total.item()
        for noise in (0.0, 0.4)
    ]
    assert losses[0] != pytest.approx(losses[1], rel=checks.CLOSE["rtol"])


def check_optimizers() -> None:
    found = checks.check_optimizers(checks.NEXT_SCALE)
    assert found == {name: transformer_rule(name) for name in found}


def check_seed() -> None:
    """Two seeds give two noises."""
    batch, task = checks.samples(), checks.make(checks.AUTOENCODE)
    losses = [task(batch, checks.draw_of(batch, seed)).total.item() for seed in (0, 1)]
    assert losses[0] != losses[1]


def check_tokenize() -> None:
    checks.check_tokenize("all")


Check = Callable[[], Any]
FAULTS: dict[str, tuple[Callable[[Patch], None], Check]] = {
    "teacher forcing on the labels": (labels_as_inputs, checks.check_next_scale),
    "token weights ignored": (equal_token_weights, checks.check_next_scale),
    "Muon off": (muon_off, check_optimizers),
    "a sign flipped": (preference_of_the_rejected, checks.check_next_scale),
    "latent noise gone": (no_latent_noise, check_noise),
    "a term missing": (no_commitment, check_tokenize),
    "the preference term missing": (no_preference, checks.check_next_scale),
    "a gradient detached": (frozen_codebook, check_tokenize),
    "the wrong class dropped": (degraded_class_dropped_to, checks.check_next_scale),
    "the seed ignored": (seed_ignored, check_seed),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: Patch) -> None:
    plant, check = FAULTS[fault]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_without_a_fault_the_checks_pass() -> None:
    """Those that `test_tasks` does not already make."""
    check_noise()
    check_optimizers()
    check_seed()
