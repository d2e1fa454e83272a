"""The Triton backend of `group_norm_silu` on Triton's interpreter.

test_group_norm_silu_triton.py runs this file.

Triton asks for its interpreter once, as kernels are defined: hence a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import group_norm_silu
from tests.ops.test_group_norm_silu import FORMATS, NAMES, OP, SIZES, check, is_channels_last, problem


@pytest.fixture(scope="module", autouse=True)
def _backend() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", NAMES)
def test_equals_pytorch(dtype: torch.dtype, layout: torch.memory_format) -> None:
    for size in SIZES:
        check(*problem(size, dtype, layout))


@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
def test_several_tiles_and_wide_groups(layout: torch.memory_format) -> None:
    """Tiles and channels that are cut off; more tiles than are joined at once, in groups of many channels."""
    for size in [(2, 40, 30, 31, 8), (1, 3, 50, 70, 1), (1, 1030, 23, 23, 1)]:
        check(*problem(size, torch.float32, layout))


@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
def test_a_mean_that_is_large_beside_the_deviation(layout: torch.memory_format) -> None:
    x, weight, bias, groups = problem((1, 64, 20, 20, 32), torch.float32, layout)
    x = 100 + torch.randn_like(x).sign() * (1 + torch.rand_like(x))
    check(x, weight, bias, groups, tolerance="mean_of_100")


def test_strides_and_mixed_dtypes() -> None:
    x, weight, bias, groups = problem((2, 12, 5, 4, 3))
    rows = torch.stack([weight, bias], 1)
    check(x.mT, rows[:, 0].bfloat16(), rows[:, 1], groups)
    wide = torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)
    assert is_channels_last(group_norm_silu(wide[:, :12], weight, bias, groups))
    check(wide[:, :12], weight, bias, groups)


def test_a_bad_group_disturbs_no_other() -> None:
    for layout in FORMATS:
        x, weight, bias, groups = problem((1, 12, 5, 7, 3), torch.float32, layout)
        x[0, 5, 2, 3] = torch.nan
        out = group_norm_silu(x, weight, bias, groups).contiguous().view(3, -1)
        assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_opcheck() -> None:
    for layout in FORMATS:
        torch.library.opcheck(OP, (*problem(SIZES[1], torch.bfloat16, layout), 1e-6))
    torch.library.opcheck(OP, (*problem((2, 4, 0, 3, 2)), 1e-6))
