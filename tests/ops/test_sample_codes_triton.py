"""The Triton backend of `sample_codes`: its cases on Triton's interpreter, and when it cannot run."""

from __future__ import annotations

import pytest
import torch

from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import sample_codes, sample_codes_triton
from tests.ops.interpreter import run_cases
from tests.ops.test_sample_codes import KINDS, OPTIONS, generator, logits_of


def test_interpreted() -> None:
    run_cases("sample_codes_interpreted.py")


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert sample_codes_triton.supports(torch.zeros(1, 4)) == "needs CUDA or HIP tensors, found cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert sample_codes_triton.supports(torch.zeros(1, 16385)) == "needs V of at most 16384, found 16385"
    assert sample_codes_triton.supports(torch.zeros(1, 16384)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind: str) -> None:
    for rows, codes in [(50, 1), (50, 65), (1024, 4096), (20, 16384)]:
        logits, uncond = logits_of(kind, rows, codes), logits_of(kind, rows, codes)
        for seed, options in enumerate(OPTIONS):
            found = []
            for device, backend in (("cuda", "triton"), ("cpu", "reference")):
                with use_backend(backend):
                    codes_drawn = sample_codes(
                        logits.to(device),
                        uncond_logits=uncond.to(device),
                        guidance=1.5,
                        generator=generator(seed),
                        **options,
                    )
                found.append(codes_drawn.cpu())
            assert torch.equal(*found)
