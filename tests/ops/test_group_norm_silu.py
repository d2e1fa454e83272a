"""`group_norm_silu` on each backend against PyTorch's own steps, in float64; its contract."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast.ops import group_norm_silu
from hitsr_fast.ops.group_norm_silu_triton import tile_of
from tests.ops.backends import refusal, sizes
from tests.tolerances import TOLERANCES

NAMES = {torch.float32: "float32_reordered", torch.bfloat16: "bfloat16", torch.float16: "float16"}
FORMATS = [torch.contiguous_format, torch.channels_last]
Size = tuple[int, int, int, int, int]
# B, C, H, W, groups.
SMALL: list[Size] = [
    (1, 1, 1, 1, 1),
    (2, 6, 3, 5, 3),
    (1, 160, 7, 9, 32),
    (3, 40, 33, 2, 5),
    (1, 64, 24, 24, 1),
]
SIZES = {"any": SMALL, "gpu": [*SMALL, (1, 160, 256, 256, 32), (2, 640, 32, 32, 32)]}
# Maps of one block and of several.
MEANS: dict[str, list[Size]] = {
    "any": [(1, 64, 4, 4, 32), (2, 96, 40, 40, 32), (1, 3, 210, 200, 1)],
    "interpreted": [(1, 64, 20, 20, 32), (1, 3, 50, 70, 1)],
}


def problem(
    size: Size,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Arguments of a call; each group has a mean and a deviation of its own."""
    B, C, H, W, groups = size
    x = torch.randn(B, groups, C // groups, H, W) * (torch.rand(B, groups, 1, 1, 1) * 3 + 0.1)
    x = (x + torch.randn(B, groups, 1, 1, 1)).flatten(1, 2).to(dtype)
    weight, bias = torch.randn(C).to(dtype), torch.randn(C).to(dtype)
    return x.contiguous(memory_format=layout), weight, bias, groups


def plain(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-6) -> Tensor:
    """PyTorch's own formula in float64."""
    parts = x.double().contiguous().view(x.shape[0], groups, x[:1].numel() // groups)
    mean = parts.mean(2, keepdim=True)
    variance = (parts - mean).square().mean(2, keepdim=True)
    normal = ((parts - mean) / (variance + eps).sqrt()).view(x.shape)
    return F.silu(normal * weight.double()[:, None, None] + bias.double()[:, None, None])


def check(x: Tensor, *rest: Any, tolerance: str | None = None) -> None:
    out = group_norm_silu(x, *rest)
    assert out.dtype == x.dtype and out.shape == x.shape
    close = TOLERANCES[tolerance or NAMES[x.dtype]]
    torch.testing.assert_close(out.double(), plain(x, *rest), **close._asdict())


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", NAMES)
def test_equals_pytorch(backend: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for size in sizes(backend, SIZES):
        check(*problem(size, dtype, layout))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
def test_several_tiles_and_wide_groups(backend: str, layout: torch.memory_format) -> None:
    """Tiles and channels that are cut off; more tiles than are joined at once, in groups of many channels."""
    for size in [(2, 40, 30, 31, 8), (1, 3, 50, 70, 1), (1, 1030, 23, 23, 1)]:
        check(*problem(size, torch.float32, layout))


def test_the_definition_is_group_norm_and_silu() -> None:
    x, weight, bias, groups = (t.double() if isinstance(t, Tensor) else t for t in problem(SMALL[2]))
    found = group_norm_silu(x, weight, bias, groups, eps=0.1)
    expected = F.silu(F.group_norm(x, groups, weight, bias, 0.1))
    torch.testing.assert_close(found, expected, **TOLERANCES["float64_reordered"]._asdict())


@given(
    B=st.integers(0, 3),
    groups=st.integers(1, 6),
    width=st.integers(1, 40),
    H=st.integers(0, 12),
    W=st.integers(1, 40),
    layout=st.sampled_from(FORMATS),
)
def test_any_size(
    backend: str, B: int, groups: int, width: int, H: int, W: int, layout: torch.memory_format
) -> None:
    check(*problem((B, groups * width, H, W, groups), torch.float32, layout))


@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
def test_a_mean_that_is_large_beside_the_deviation(backend: str, layout: torch.memory_format) -> None:
    """In maps of one block and of several, also where the means of blocks or channels are far apart."""
    for size in sizes(backend, MEANS):
        x, weight, bias, groups = problem(size, torch.float32, layout)
        x = 100 + torch.randn_like(x).sign() * (1 + torch.rand_like(x))
        check(x, weight, bias, groups, tolerance="mean_of_100")
        x[:, ::2] += 10
        check(x, weight, bias, groups, tolerance="mean_of_100")
    x[:, :, :100] += 300
    check(x, weight, bias, groups, tolerance="mean_of_100")


@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
def test_far_out_on_both_sides(backend: str, layout: torch.memory_format) -> None:
    """SiLU of large values is the value, of negative ones nothing; no power overflows on the way."""
    signs = 1.0 - 2 * (torch.arange(64) % 2)
    x = signs.view(1, 4, 4, 4).contiguous(memory_format=layout)
    for dtype, size in [(torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float16, 6e4)]:
        weight = torch.full((4,), size, dtype=dtype)
        out = group_norm_silu(x.to(dtype), weight, torch.zeros_like(weight), 2)
        torch.testing.assert_close(
            out.double(), x.double().clamp(min=0) * float(weight[0]), **TOLERANCES[NAMES[dtype]]._asdict()
        )


@pytest.mark.parametrize("weight", [-1.0, 0.01, 1.0, 30.0])
def test_float32_silu_to_the_last_places(backend: str, weight: float) -> None:
    """Beside the largest value; 16-bit results are rounded too coarsely to see a wrong power."""
    x = torch.linspace(-3, 3, 4096).view(1, 1, 64, 64)
    found = group_norm_silu(x, torch.tensor([weight]), torch.tensor([0.1]), 1)
    expected = plain(x, torch.tensor([weight]), torch.tensor([0.1]), 1)
    error = (found.double() - expected).abs().max()
    assert error <= TOLERANCES["few_float32_roundings"].rtol * expected.abs().max()


@pytest.mark.backends("reference", "cpu")  # Triton's interpreter cuts bfloat16 off
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_are_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """Against float64 rounded to the same dtype, few values differ, and those by one place."""
    x, weight, bias, groups = problem((1, 64, 40, 40, 32), dtype, torch.channels_last)
    found = group_norm_silu(x, weight, bias, groups)
    expected = plain(x, weight, bias, groups).to(dtype)
    apart = (found.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    apart[expected.abs() < 2.0**-10] = 0  # where the places lie close together
    assert apart.max() <= 1
    assert (apart > 0).double().mean() < 0.1


def test_memory_format_of_the_result(backend: str) -> None:
    x, weight, bias, groups = problem((2, 8, 6, 5, 4))
    nhwc = x.contiguous(memory_format=torch.channels_last)
    wide = torch.cat([nhwc, nhwc], 1).contiguous(memory_format=torch.channels_last)
    views = [
        (x, False),
        (nhwc, True),
        (wide[:, :8], True),  # channels side by side, with a gap after them
        (nhwc[:, :, ::2], True),
        (x.mT, False),
        (x[:, :, ::2, 1:], False),
        (nhwc[..., :1, :1], True),
        (x[:1].expand(2, -1, -1, -1), False),
    ]
    for view, channels_last in views:
        out = group_norm_silu(view, weight, bias, groups)
        assert is_channels_last(out) if channels_last and out[0, 0].numel() > 1 else out.is_contiguous()
        torch.testing.assert_close(
            out.double(), plain(view, weight, bias, groups), **TOLERANCES["float32_reordered"]._asdict()
        )


def test_strides_and_dtypes_of_weight_and_bias(backend: str) -> None:
    x, weight, bias, groups = problem((2, 12, 5, 4, 3))
    strided = torch.stack([weight, bias], 1)
    check(x, strided[:, 0], strided[:, 1], groups)
    check(x.mT, strided[:, 0].bfloat16(), strided[:, 1], groups)
    check(x, weight.bfloat16(), bias.half(), groups)
    check(x.bfloat16(), weight, bias, groups)


@pytest.mark.backends("reference")
def test_float64(backend: str) -> None:
    for layout in FORMATS:
        x, weight, bias, groups = problem(SMALL[1], torch.float32, layout)
        for wide in ((x.double(), weight, bias), (x, weight.double(), bias), (x, weight, bias.double())):
            out = group_norm_silu(*wide, groups)
            close = TOLERANCES["float64_reordered" if out.dtype == torch.float64 else "float32_reordered"]
            torch.testing.assert_close(out.double(), plain(*wide, groups), **close._asdict())


@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
def test_a_bad_group_disturbs_no_other(backend: str, layout: torch.memory_format) -> None:
    for dtype in NAMES:
        x, weight, bias, groups = problem((2, 12, 5, 7, 3), dtype, layout)
        x[0, 5, 2, 3], x[1, 0, 0, 0] = torch.nan, torch.inf
        out = group_norm_silu(x, weight, bias, groups).contiguous().view(2, 3, -1)
        bad = torch.tensor([[False, True, False], [True, False, False]])
        assert torch.equal(out.isnan().all(2), bad) and torch.equal(out.isfinite().all(2), ~bad)


@pytest.mark.backends("reference", "cpu")
def test_a_large_result(backend: str) -> None:
    """Of more than 32 MiB, whose memory is asked for in large pages."""
    x = torch.randn(1, 4, 1500, 1500)[:, :, :1500, :1499]
    for layout in FORMATS:
        given = x.contiguous(memory_format=layout)
        check(given, torch.ones(4), torch.zeros(4), 2)


def test_bad_arguments() -> None:
    x, row = torch.zeros(2, 6, 3, 4), torch.zeros(6)
    cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        (([1.0], row, row, 2), TypeError, "x: expected a float16 or .* tensor, found list"),
        ((x.int(), row, row, 2), TypeError, "x: expected dtype .*, found int32"),
        ((x[0], row, row, 2), ValueError, r"x: expected shape \(B, C, H, W\), found \(6, 3, 4\)"),
        ((x[:, :0], row[:0], row[:0], 1), ValueError, r"x: expected C of at least 1, found shape \(2, 0, 3"),
        ((x, row.long(), row, 2), TypeError, "weight: expected dtype .*, found int64"),
        ((x, row[1:], row, 2), ValueError, r"weight: expected shape \(C=6\), found \(5,\)"),
        ((x, row, row[None], 2), ValueError, r"bias: expected shape \(C=6\), found \(1, 6\)"),
        ((x, row, row.to("meta"), 2), ValueError, "bias: expected device cpu, found meta"),
        ((x, row, row, 0), ValueError, "groups: expected a divisor of C = 6, found 0"),
        ((x, row, row, 4), ValueError, "groups: expected a divisor of C = 6, found 4"),
        ((x, row, row, -2), ValueError, "groups: expected a divisor of C = 6, found -2"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            group_norm_silu(*arguments)
    for eps in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"eps: expected a finite number above 0, found {eps}"):
            group_norm_silu(x, row, row, 2, eps=eps)


def test_what_triton_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    x, row = torch.zeros(1, 2, 3, 4), torch.zeros(2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    supports = functools.partial(refusal, "group_norm_silu", "triton")
    assert supports(x, row, row, 1, 1e-6) == "needs CUDA or HIP tensors, found x on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert supports(x, row, row, 1, 1e-6) is None
    many = torch.zeros(1, 1, 1, 1).expand(65536, 1, 1, 1)
    assert supports(many, row[:1], row[:1], 1, 1e-6) == "needs B of at most 65535, found 65536"
    wide = torch.zeros(1, 8194, 1, 1)
    reason = "needs at most 4096 channels in a group, found 4097"
    assert supports(wide, wide[0, :, 0, 0], wide[0, :, 0, 0], 2, 1e-6) == reason


def test_tiles_are_of_one_size() -> None:
    for channels in (1, 3, 8, 96, 640):
        for channels_last in (False, True):
            tile = tile_of(channels, channels_last)
            assert tile["PIXELS"] * tile["CHANNELS"] == 4096 and tile["CHANNELS"] < 2 * channels
