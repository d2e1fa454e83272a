"""The Triton backend of `group_norm_silu`: its cases on Triton's interpreter, and when it cannot run."""

from __future__ import annotations

import pytest
import torch

from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import group_norm_silu
from hitsr_fast.ops.group_norm_silu_triton import supports, tile_of
from tests.ops.interpreter import run_cases
from tests.ops.test_group_norm_silu import FORMATS, NAMES, check, problem


def test_interpreted() -> None:
    run_cases("group_norm_silu_interpreted.py")


def test_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, row = torch.zeros(1, 2, 3, 4), torch.zeros(2)
    assert supports(x, row, row, 1, 1e-6) == "needs CUDA or HIP tensors, found cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert supports(x, row, row, 1, 1e-6) is None
    for given in ((x.double(), row, row), (x, row.double(), row), (x, row, row.double())):
        assert supports(*given, 1, 1e-6) == "needs float16, bfloat16 or float32, found float64"
    many = torch.zeros(1, 1, 1, 1).expand(65536, 1, 1, 1)
    assert supports(many, row[:1], row[:1], 1) == "needs B of at most 65535, found 65536"
    wide = torch.zeros(1, 8194, 1, 1)
    reason = "needs at most 4096 channels in a group, found 4097"
    assert supports(wide, wide[0, :, 0, 0], wide[0, :, 0, 0], 2) == reason


def test_tiles_are_of_one_size() -> None:
    for channels in (1, 3, 8, 96, 640):
        for channels_last in (False, True):
            tile = tile_of(channels, channels_last)
            assert tile["PIXELS"] * tile["CHANNELS"] == 4096 and tile["CHANNELS"] < 2 * channels


@pytest.mark.gpu
@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", NAMES)
def test_on_a_gpu(dtype: torch.dtype, layout: torch.memory_format) -> None:
    for size in [(1, 1, 1, 1, 1), (3, 40, 33, 2, 5), (1, 160, 256, 256, 32), (2, 640, 32, 32, 32)]:
        with torch.device("cuda"), use_backend("triton"):
            arguments = problem(size, dtype, layout)
            check(*arguments)
            assert torch.equal(group_norm_silu(*arguments), group_norm_silu(*arguments))
