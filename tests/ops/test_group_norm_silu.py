"""`group_norm_silu` and its gradient on each backend against PyTorch's steps in float64; its contract."""

from __future__ import annotations

import functools
import itertools
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
Inputs = tuple[Tensor, Tensor, Tensor, int]
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
# Of gradients: of one block and of several, and of more channels than are worked on at once.
TRAINED: dict[str, list[Size]] = {
    "any": [*SMALL[1:], (2, 96, 40, 40, 32), (1, 4104, 3, 2, 8)],
    "interpreted": [SMALL[1], (1, 40, 24, 24, 8)],
    "gpu": [*SMALL[1:], (1, 160, 256, 256, 32), (2, 640, 32, 32, 32)],
}


def problem(
    size: Size,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
) -> Inputs:
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


def check_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    grad: Tensor | None = None,
    eps: float = 1e-6,
    tolerance: str | None = None,
) -> None:
    """Each against autograd of PyTorch's formula in float64, over the largest value of each."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    out = group_norm_silu(*inputs, groups, eps=eps)
    grad = torch.randn(out.shape).to(out.dtype) if grad is None else grad
    grads = torch.autograd.grad(out, inputs, grad)
    wide = [t.detach().double().contiguous().requires_grad_() for t in inputs]
    expected = F.silu(torch.group_norm(wide[0], groups, wide[1], wide[2], eps))
    wanted = torch.autograd.grad(expected, wide, grad.double())
    for found, want, argument in zip(grads, wanted, inputs, strict=True):
        assert found.dtype == argument.dtype and found.shape == argument.shape
        size = want.abs().max().clamp(min=1) if want.numel() else 1
        close = TOLERANCES[tolerance or NAMES[argument.dtype]]
        torch.testing.assert_close(found.double() / size, want / size, **close._asdict())
    assert grads[0].stride() == out.stride(), "a gradient lies as its map does"


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


@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", NAMES)
def test_gradients_equal_pytorchs(backend: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for size in sizes(backend, TRAINED):
        check_gradients(*problem(size, dtype, layout))


@given(
    B=st.integers(0, 3),
    groups=st.integers(1, 6),
    width=st.integers(1, 40),
    H=st.integers(1, 12),
    W=st.integers(1, 40),
    layout=st.sampled_from(FORMATS),
)
def test_gradients_of_any_size(
    backend: str, B: int, groups: int, width: int, H: int, W: int, layout: torch.memory_format
) -> None:
    """eps is such that a group of few values, which may lie close together, is not enlarged."""
    check_gradients(*problem((B, groups * width, H, W, groups), torch.float32, layout), eps=0.1)


@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_gradcheck(layout: torch.memory_format, eps: float) -> None:
    x, weight, bias, groups = problem((2, 6, 3, 2, 3), torch.float64, layout)
    inputs = tuple(t.requires_grad_() for t in (x, weight, bias))
    function = functools.partial(group_norm_silu, groups=groups, eps=eps)
    assert torch.autograd.gradcheck(function, inputs, **TOLERANCES["gradcheck"]._asdict())


@pytest.mark.parametrize(("mean", "tolerance"), [(100, "mean_of_100"), (1000, "mean_of_1000")])
@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
def test_gradients_keep_their_digits_beside_a_large_mean(
    backend: str, layout: torch.memory_format, mean: int, tolerance: str
) -> None:
    """Sixteenths about the mean, which float32 holds: x has no rounding of its own."""
    for size in sizes(backend, MEANS):
        x, weight, bias, groups = problem(size, torch.float32, layout)
        x = mean + (torch.randn_like(x) * 16).round() / 16
        check(x, weight, bias, groups, tolerance=tolerance)
        check_gradients(x, weight, bias, groups, tolerance=tolerance)


@pytest.mark.parametrize("weight", [-1.0, 0.01, 1.0, 30.0])
def test_float32_gradients_to_the_last_places(backend: str, weight: float) -> None:
    """Beside the largest value, over the whole bend of SiLU."""
    x = torch.linspace(-3, 3, 4096).view(1, 1, 64, 64)
    rows = torch.tensor([weight]), torch.tensor([0.1])
    grad, wide = torch.randn(x.shape), x.double().requires_grad_()
    x.requires_grad_()
    (found,) = torch.autograd.grad(group_norm_silu(x, *rows, 1), x, grad)
    (expected,) = torch.autograd.grad(plain(wide, *rows, 1), wide, grad.double())
    error = (found.double() - expected).abs().max()
    assert error <= TOLERANCES["few_float32_roundings"].rtol * expected.abs().max()


@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
def test_gradients_far_out_on_both_sides(backend: str, layout: torch.memory_format) -> None:
    """SiLU's derivative is 1 there or 0, also where float32 has no power that small."""
    x = (1.0 - 2 * (torch.arange(64) % 2)).view(1, 4, 4, 4).contiguous(memory_format=layout).requires_grad_()
    for size in (80.0, 90.0, 1e4, 1e38):
        row = torch.full((4,), size, requires_grad=True)
        bias = torch.zeros(4, requires_grad=True)
        out = group_norm_silu(x, row, bias, 2)
        grads = torch.autograd.grad(out, (row, bias), torch.ones_like(out))
        for found in grads:  # eight values of sixteen are above the mean, by the deviation
            torch.testing.assert_close(
                found, torch.full((4,), 8.0), **TOLERANCES["float32_reordered"]._asdict()
            )


def test_gradients_of_views_and_from_views(backend: str) -> None:
    """x at an offset, with gaps, turned over, spread out; gradients in another layout than the result's."""
    x, weight, bias, groups = problem((2, 8, 6, 5, 4))
    nhwc = x.contiguous(memory_format=torch.channels_last)
    wide = torch.cat([nhwc, nhwc], 1).contiguous(memory_format=torch.channels_last)
    views = [wide[:, 4:12], nhwc[:, :, 1::2], x.mT, x[:, :, ::2, 1:], x[1:].expand(2, -1, -1, -1)]
    rows = torch.stack([weight, bias], 1)
    for view in views:
        check_gradients(view, rows[:, 0], rows[:, 1], groups)
    for whole in (x, nhwc):
        grad = torch.randn(x.shape)
        for laid in (grad, grad.contiguous(memory_format=torch.channels_last), grad.mT.contiguous().mT):
            check_gradients(whole, weight, bias, groups, grad=laid)
        check_gradients(whole, weight, bias, groups, grad=torch.ones(()).expand(x.shape))


def test_each_gradient_has_the_dtype_of_its_own_argument(backend: str) -> None:
    x, weight, bias, groups = problem((2, 12, 5, 4, 3))
    triples = list(itertools.product(NAMES, NAMES, NAMES))
    for dtypes in sizes(backend, {"any": triples, "interpreted": triples[5::5]}):
        given = [t.to(dtype) for t, dtype in zip((x, weight, bias), dtypes, strict=True)]
        coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        check_gradients(*given, groups, tolerance=NAMES[coarsest])


def test_sums_are_rounded_once(backend: str) -> None:
    """To the dtype of their own argument: of a bias in float32 beside float16, more than that holds."""
    x, row = torch.randn(2, 8, 16, 16).half(), torch.zeros(8)
    weight, bias = row.half().requires_grad_(), row.clone().requires_grad_()
    group_norm_silu(x, weight, bias, 2).backward(torch.full_like(x, 400.0))
    assert bias.grad is not None
    assert (bias.grad == 200 * 512).all(), "SiLU's derivative at 0 is a half"


def test_gradients_of_some_arguments_are_those_of_all(backend: str) -> None:
    x, weight, bias, groups = problem((2, 12, 5, 4, 3))
    grad, found = torch.randn(x.shape), {}
    for chosen in itertools.product([False, True], repeat=3):
        inputs = [
            t.detach().requires_grad_(wanted) for t, wanted in zip((x, weight, bias), chosen, strict=True)
        ]
        out = group_norm_silu(*inputs, groups)
        assert out.requires_grad == any(chosen)
        asking = [t for t in inputs if t.requires_grad]
        found[chosen] = torch.autograd.grad(out, asking, grad) if asking else ()
    for chosen, grads in found.items():
        expected = list(itertools.compress(found[True, True, True], chosen))
        assert all(torch.equal(one, other) for one, other in zip(grads, expected, strict=True))


def test_a_second_backward_gives_the_same(backend: str) -> None:
    x, weight, bias, groups = problem((2, 12, 5, 4, 3))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    out = group_norm_silu(*inputs, groups)
    once, twice = (torch.autograd.grad(out.sum(), inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))


def test_gradients_of_nothing(backend: str) -> None:
    for shape in [(0, 4, 3, 3), (2, 4, 0, 3)]:
        x, weight, bias, groups = problem((*shape, 2))
        inputs = [t.requires_grad_() for t in (x, weight, bias)]
        of_x, *of_rows = torch.autograd.grad(group_norm_silu(*inputs, groups).sum(), inputs)
        assert of_x.shape == shape and not any(grad.any() for grad in of_rows)


@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
def test_a_bad_group_disturbs_no_others_gradient(backend: str, layout: torch.memory_format) -> None:
    for dtype in NAMES:
        x, weight, bias, groups = problem((2, 12, 5, 7, 3), dtype, layout)
        x[0, 5, 2, 3], x[1, 0, 0, 0] = torch.nan, torch.inf
        inputs = [t.requires_grad_() for t in (x, weight, bias)]
        grads = torch.autograd.grad(group_norm_silu(*inputs, groups).sum(), inputs)
        of_x = grads[0].contiguous().view(2, 3, -1)
        bad = torch.tensor([[False, True, False], [True, False, False]])
        assert torch.equal(of_x.isnan().all(2), bad) and torch.equal(of_x.isfinite().all(2), ~bad)
        for of_row in grads[1:]:
            assert torch.equal(of_row.view(3, 4).isfinite().all(1), ~bad.any(0))


@pytest.mark.backends("reference", "cpu")
@pytest.mark.parametrize("layout", FORMATS, ids=["nchw", "nhwc"])
def test_sums_over_a_large_map(backend: str, layout: torch.memory_format) -> None:
    """A million terms of one sign, of which a running sum in float32 loses three digits."""
    x, weight, bias, groups = problem((1, 2, 1024, 1000, 1), torch.float32, layout)
    inputs, wide = (
        [weight.requires_grad_(), bias.requires_grad_()],
        [t.detach().double() for t in (weight, bias)],
    )
    grads = torch.autograd.grad(group_norm_silu(x, *inputs, groups).sum(), inputs)
    expected = plain(x, *(t.requires_grad_() for t in wide), groups)
    for found, want in zip(grads, torch.autograd.grad(expected.sum(), wide), strict=True):
        error = (found.double() - want).abs().max()
        assert error <= TOLERANCES["few_float32_roundings"].rtol * want.abs().max()


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
