"""How many kernels of Triton one sample of HIT-VAR starts where no graph takes them together."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hitsr_fast.models import HitVar
from hitsr_fast.models.hit_var.config import HIT_D16
from hitsr_fast.models.hit_var.sampler import HitSampler
from hitsr_fast.nn.sampling import SamplingOptions

pytestmark = pytest.mark.backends("triton")

DEPTH, SCALES = HIT_D16.transformer.depth, len(HIT_D16.tokenizer.scales)


@pytest.fixture
def started(backend: str, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Kernels by name; none is run, as thousands would take hours on the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter's launches are counted")
    from triton.runtime.interpreter import GridExecutor

    found: Counter[str] = Counter()

    def launch(self: Any, *args: Any, **_: Any) -> None:
        found[self.fn.__name__.strip("_").removesuffix("_kernel")] += 1
        for values in args:
            if isinstance(values, Tensor) and values.dtype == torch.int64:
                values.zero_()  # an index, which is looked at

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    return found


def sampler() -> HitSampler:
    """HIT-d16, but for widths, on which launches do not depend."""
    tokenizer = replace(
        HIT_D16.tokenizer, channels=32, channel_multipliers=(1,), residual_blocks=1, stem_patch=16
    )
    return HitSampler(
        HitVar(replace(HIT_D16, tokenizer=tokenizer, transformer=replace(HIT_D16.transformer, width=128)))
    )


# The same count when branch end and next norm were two kernels, and each scale of a decoding one.
BEFORE = {"greedy": 1057, "guided": 1022}


@pytest.mark.parametrize("kind", BEFORE)
@torch.no_grad()
def test_launches_of_a_sample(started: Counter[str], kind: str) -> None:
    options = (
        SamplingOptions()
        if kind == "greedy"
        else SamplingOptions(guidance=2.0, top_k=900, top_p=0.96, seed=0)
    )
    features = torch.zeros(1, HIT_D16.tokenizer.code_dim, *[HIT_D16.tokenizer.latent_size] * 2)
    sampler().sample(features, torch.zeros(1, dtype=torch.int64), options)
    blocks = DEPTH * SCALES
    each = {"attention_prologue": blocks, "cached_attention": blocks, "gated_residual_norm": 2 * blocks}
    assert each.items() <= started.items()
    assert started.total() <= BEFORE[kind] * 2 / 3, started
