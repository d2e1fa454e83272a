"""The gradient of the residual quantizer on every backend; `test_residual_quantize` tests its definition."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

import hitsr_fast.reference.residual_quantize as reference
from benchmarks.shapes import MODELS
from hitsr_fast.backends import MAX_GRID
from hitsr_fast.dispatch import forced_backend, operations
from hitsr_fast.ops import phi_table, residual_decode, residual_quantize
from hitsr_fast.ops import residual_decode_backward_triton as triton
from hitsr_fast.ops.residual_decode_backward_cuda import CHANNELS
from tests.ops.backends import INTERPRETED, SHIPPED, fewer_when_interpreted, threads
from tests.ops.residual_quantizer import Bank, assert_near, bank, encode_arguments, problems
from tests.tolerances import TOLERANCES

OP = operations()["residual_decode_backward"]
pytestmark = pytest.mark.backends(*OP.backends)
quick_backends = pytest.mark.backends(*(name for name in OP.backends if name != "triton" or not INTERPRETED))
slow_when_interpreted = pytest.mark.slow if INTERPRETED else pytest.mark.backends(*OP.backends)
our_own = pytest.mark.backends(*(name for name in OP.backends if name != "reference"))

ASKED = ("the last", "each", "both")
Gradients = tuple[Tensor, Tensor, Tensor]
RECTANGLE: dict[str, Any] = {
    "size": (5, 7),
    "scales": [(1, 1), (2, 3), (5, 2), (3, 7), (5, 7)],  # one that has the map's height, and one its width
    "phi_index": [0, 1, 1, 0, 1],
    "phi_ratio": 0.5,
}
SQUARE: dict[str, Any] = {
    "size": (4, 4),
    "scales": [(1, 1), (3, 3), (4, 4)],
    "phi_index": [0, 1, 1],
    "phi_ratio": 0.5,
}


class Call(NamedTuple):
    """The arguments of the op."""

    grad: Tensor
    grad_per_scale: Tensor
    indices: Tensor
    codebook: Tensor
    phi_weight: Tensor
    scales: list[int]
    phi_index: list[int]
    phi_ratio: float

    def run(self) -> Gradients:
        found: Gradients = torch.ops.hitsr_fast.residual_decode_backward(*self)
        return found

    def on_cpu(self, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[Any]:
        return [change(value.cpu()) if isinstance(value, Tensor) else value for value in self]


def call_of(
    problem: dict[str, Any],
    asked: str = "both",
    *,
    B: int = 2,
    K: int = 9,
    C: int = 3,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """A call on random values, with a phi that no scale uses. CUDA's kernels take some channels only."""
    if forced_backend() == "cuda":
        C = min((taken for taken in CHANNELS if taken >= C), default=CHANNELS[-1])
    H, W = problem["size"]
    flat = [side for scale in problem["scales"] for side in scale]
    codebook, phi_weight, _ = bank(K=K, C=C, P=max(2, *problem["phi_index"]) + 1, dtype=dtype)
    grad = torch.randn(B, C, H, W)
    each = torch.randn(0 if asked == "the last" else len(problem["scales"]), B, C, H, W)
    tokens = sum(h * w for h, w in problem["scales"])
    return Call(
        grad.zero_() if asked == "each" else grad,
        each,
        torch.randint(0, K, (B, tokens)),
        codebook,
        phi_weight,
        flat,
        problem["phi_index"],
        problem["phi_ratio"],
    )


def check(call: Call) -> Gradients:
    """Run a call and hold its results to the house rule, by the definition in float64 and in float32."""
    found = call.run()
    double = lambda tensor: tensor.double() if tensor.is_floating_point() else tensor  # noqa: E731
    exact = reference.residual_decode_backward(*call.on_cpu(double))
    plain = reference.residual_decode_backward(*call.on_cpu())
    for result, *expected in zip(found, exact, plain, strict=True):
        assert result.is_contiguous()
        assert_near(result.cpu(), *expected)
    return found


def assert_same_bits(found: Gradients, expected: Gradients) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@slow_when_interpreted
@fewer_when_interpreted
@given(problem=problems(), asked=st.sampled_from(ASKED), data=st.data())
def test_agrees_with_the_definition(
    backend: str, problem: dict[str, Any], asked: str, data: st.DataObject
) -> None:
    B, K, C = (data.draw(st.integers(1, most), label) for most, label in ((3, "B"), (9, "K"), (5, "C")))
    check(call_of(problem, asked, B=B, K=K, C=C))


@slow_when_interpreted
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_a_rectangle(backend: str, ratio: float, asked: str) -> None:
    found = check(call_of(RECTANGLE | {"phi_ratio": ratio}, asked))
    if ratio == 0:
        assert not found[1].any() and not found[2].any()


@slow_when_interpreted
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("channels", [1, 5, 8, 32, 33, 64])
def test_channels(backend: str, channels: int, asked: str) -> None:
    check(call_of(SQUARE, asked, C=channels, K=20))


@quick_backends
@pytest.mark.parametrize("asked", ASKED)
def test_the_most_channels(backend: str, asked: str) -> None:
    check(call_of(SQUARE, asked, C=256))


@quick_backends
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize(("B", "C", "K"), [(1, 32, 4096), (3, 32, 50)])
def test_scales_of_hit(backend: str, B: int, C: int, K: int, asked: str) -> None:
    sides = MODELS["hit-d16"].scales
    problem = {
        "size": (sides[-1], sides[-1]),
        "scales": [(side, side) for side in sides],
        "phi_index": phi_table(len(sides)),
        "phi_ratio": 0.5,
    }
    check(call_of(problem, asked, B=B, C=C, K=K))


@slow_when_interpreted
@pytest.mark.parametrize(
    ("size", "scales"),
    [
        ((1, 1), [(1, 1)]),
        ((1, 6), [(1, 1), (1, 4), (1, 6)]),
        ((6, 1), [(2, 1), (6, 1)]),
        ((2, 2), [(1, 1), (2, 2), (2, 2)]),
        ((3, 17), [(2, 16), (3, 17)]),
    ],
)
@pytest.mark.parametrize("asked", ASKED)
def test_narrow_maps(backend: str, size: tuple[int, int], scales: list[tuple[int, int]], asked: str) -> None:
    problem = {"size": size, "scales": scales, "phi_index": [1] * len(scales), "phi_ratio": 0.5}
    found = check(call_of(problem, asked))
    assert not found[1][0].any() and not found[2][0].any()  # nobody uses phi 0


@slow_when_interpreted
@pytest.mark.parametrize("asked", ASKED)
def test_all_tokens_have_one_code(backend: str, asked: str) -> None:
    call = call_of(RECTANGLE, asked, K=300)
    found = check(call._replace(indices=torch.full_like(call.indices, 137)))
    assert torch.equal(found[0].abs().amax(1).nonzero()[:, 0].cpu(), torch.tensor([137]))


def test_codes_that_no_token_has_get_exact_zeros(backend: str) -> None:
    call = call_of(RECTANGLE, K=300)
    unused = torch.ones(300, dtype=torch.bool, device=call.indices.device)
    unused[call.indices.flatten()] = False
    found = check(call)[0]
    assert unused.any() and torch.equal(found[unused], torch.zeros_like(found[unused]))


@pytest.mark.parametrize("asked", ASKED)
def test_whole_numbers_are_exact(backend: str, asked: str) -> None:
    """Where scales have the size of the map there is nothing to round."""
    problem = {"size": (3, 4), "scales": [(3, 4), (3, 4)], "phi_index": [1, 0], "phi_ratio": 0.5}
    call = call_of(problem, asked)
    call = Call(
        *(
            value.mul(4).round() if isinstance(value, Tensor) and value.is_floating_point() else value
            for value in call
        )
    )
    exact = reference.residual_decode_backward(
        *call.on_cpu(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    )
    for found, expected in zip(call.run(), exact, strict=True):
        assert torch.equal(found.cpu().double(), expected)


@slow_when_interpreted
@pytest.mark.parametrize("asked", ASKED)
def test_a_codebook_of_one_code(backend: str, asked: str) -> None:
    check(call_of(SQUARE, asked, K=1))


@pytest.mark.parametrize("asked", ASKED)
def test_an_empty_batch(backend: str, asked: str) -> None:
    call = call_of(SQUARE, asked, B=0)
    for found, like in zip(
        call.run(), (call.codebook, call.phi_weight, call.phi_weight[:, :, 0, 0, 0]), strict=True
    ):
        assert found.shape == like.shape and not found.any()


@slow_when_interpreted
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_summed_in_float32(backend: str, dtype: torch.dtype, asked: str) -> None:
    call = call_of(RECTANGLE, asked, dtype=dtype)
    found = check(call)
    widened = call._replace(codebook=call.codebook.float(), phi_weight=call.phi_weight.float()).run()
    assert_same_bits(found, tuple(gradient.to(dtype) for gradient in widened))  # type: ignore[arg-type]
    check(call._replace(phi_weight=call.phi_weight.float()))
    check(call._replace(codebook=call.codebook.float(), grad=call.grad.to(dtype)))


@our_own
def test_strided_tensors_give_the_same_bits(backend: str) -> None:
    call = call_of(RECTANGLE)
    expected = call.run()
    views: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
        lambda tensor: tensor.mT.contiguous().mT,
        lambda tensor: tensor.movedim(-3, -1).contiguous().movedim(-1, -3) if tensor.dim() > 2 else tensor,
    )
    for view in views:
        strided = [view(value) if isinstance(value, Tensor) else value for value in call]
        assert_same_bits(Call(*strided).run(), expected)
    # What `sum().backward()` gives: one value, many times.
    one = call._replace(
        grad=torch.ones((), device=call.grad.device).expand_as(call.grad),
        grad_per_scale=torch.ones((), device=call.grad.device).expand_as(call.grad_per_scale),
    )
    copied = one._replace(grad=one.grad.clone(), grad_per_scale=one.grad_per_scale.clone())
    assert_same_bits(one.run(), copied.run())


def test_inputs_are_left_alone(backend: str) -> None:
    call = call_of(RECTANGLE)
    before = [value.clone() if isinstance(value, Tensor) else value for value in call]
    call.run()
    for value, old in zip(call, before, strict=True):
        assert not isinstance(value, Tensor) or torch.equal(value, old)


@slow_when_interpreted
@pytest.mark.parametrize("asked", ASKED)
def test_repeated_calls_give_the_same_bits(backend: str, asked: str) -> None:
    call = call_of(RECTANGLE, asked, B=3, K=2, C=8)  # two codes: sums of many tokens
    expected = call.run()
    for _ in range(3):
        assert_same_bits(call.run(), expected)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("B", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(backend: str, B: int, asked: str) -> None:
    problem = {
        "size": (16, 12),
        "scales": [(1, 1), (2, 3), (7, 7), (9, 12), (16, 12), (16, 12)],
        "phi_index": [0, 1, 1, 2, 2, 0],
        "phi_ratio": 0.5,
    }
    call = call_of(problem, asked, B=B, C=32, K=40)
    found = []
    for count in (1, 2, 3, 4):
        with threads(count):
            found.append(call.run())
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize("per_scale", [False, True])
def test_the_gradient_runs_on_the_backend_of_its_forward(
    backend: str, per_scale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = OP.backends[backend.partition(":")[0]]
    run, calls = chosen.run, []

    def recorded(*args: Any) -> Any:
        calls.append(args)
        return run(*args)

    monkeypatch.setattr(chosen, "run", recorded)
    codes = Bank(*(tensor.requires_grad_() for tensor in bank(C=8, dtype=torch.float32)))
    options = SQUARE | {"phi_index": [0, 1, 1]}
    out = residual_quantize(torch.randn(1, 8, 4, 4), *codes, **encode_arguments(options), per_scale=per_scale)
    again = residual_decode(out.indices, *codes, **options, per_scale=per_scale)
    for count, result in enumerate((out, again)):
        kept = result.reconstructions if per_scale else result.reconstruction
        assert kept is not None
        gradients = torch.autograd.grad(kept.square().sum(), codes)
        assert len(calls) == count + 1
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


# What is Triton's own.


@pytest.mark.slow
@pytest.mark.backends("triton")
def test_images_in_turns(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the workspace holds one image: codes get the same bits, phi the same sums."""
    call = call_of(SQUARE)
    at_once = call.run()
    monkeypatch.setattr(triton, "_WORKSPACE", 1)
    found = check(call)
    assert torch.equal(found[0], at_once[0])


@pytest.mark.slow
@pytest.mark.backends("triton")
def test_tokens_of_a_phi_in_shares(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program sums all tiles of a phi, or several, or one has one tile."""
    call = call_of(SQUARE, "the last")
    expected = call.run()
    for programs in (3, 6):
        monkeypatch.setattr(triton, "_PROGRAMS", programs)
        found = check(call)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])


@pytest.mark.slow
@pytest.mark.backends("triton")
def test_as_shipped(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the block sizes of a launch on a GPU."""
    monkeypatch.setattr(triton, "constants", SHIPPED[triton, "constants"])
    check(call_of(RECTANGLE))


@pytest.mark.backends("triton")
@pytest.mark.parametrize("count", [1, 16, 17, 128, 129, 700])
def test_runs_of_any_length(backend: str, count: int) -> None:
    """Whole numbers, so that each sum has one result: runs that end at, before and after edges of chunks."""
    values = torch.randint(-9, 9, (1, count, 2)).float()
    for longest in (1, 5, 130, 700):
        codes = torch.randint(1, longest + 1, (count,)).cumsum(0).div(longest + 1, rounding_mode="floor")
        indices = codes[torch.randperm(count)].view(1, count)
        codebook = torch.zeros(count + 1, 2)
        expected = codebook.index_add(0, indices[0], values[0])
        assert torch.equal(triton._sums_by_code(indices, values, codebook), expected)


@pytest.mark.backends("triton")
def test_what_is_not_finite_stays_with_its_code(backend: str) -> None:
    values = torch.ones(1, 200, 2)
    values[0, 7], values[0, 150, 1] = torch.inf, torch.nan
    indices = torch.arange(200).view(1, 200) // 3
    found = triton._sums_by_code(indices, values, torch.zeros(70, 2))
    expected = torch.full((70, 2), 3.0)
    expected[66], expected[67:] = 2.0, 0.0
    expected[2], expected[50, 1] = torch.inf, torch.nan
    assert torch.equal(found.nan_to_num(-1.0), expected.nan_to_num(-1.0))


@pytest.mark.parametrize(("side", "length"), [(1, 1), (1, 5), (4, 32), (28, 32), (3, 7), (7, 7)])
@pytest.mark.parametrize("margin", [0, 1])
@pytest.mark.backends("reference")
def test_bands_are_pytorchs(backend: str, side: int, length: int, margin: int) -> None:
    """The shares of a band are a column of the matrix that `interpolate` multiplies by."""
    firsts, counts, weights = triton._bands([side], length, margin)
    eye = torch.eye(side, dtype=torch.float64)[None, :, :, None]
    matrix = torch.nn.functional.interpolate(eye, size=(length, 1), mode="bicubic")[0, :, :, 0]
    for first, count, row, expected in zip(firsts, counts, weights, matrix, strict=True):
        band = torch.zeros(length + 4 * (margin + 1) + len(row), dtype=torch.float64)
        start = first - margin + 2 * (margin + 1)
        band[start : start + len(row)] = torch.tensor(row, dtype=torch.float64)
        places = band[2 * (margin + 1) :][:length]
        torch.testing.assert_close(places, expected, **TOLERANCES["float64_reordered"]._asdict())
        assert not any(row[count + 2 * margin :]) and len(row) >= count + 2 * margin


@pytest.fixture
def _fake_gpu() -> Iterator[None]:
    """Tensors of a GPU that have no values: to look at one, as waiting for the device would, is an error."""
    triton.plan.cache_clear()
    triton.shares.cache_clear()
    with FakeTensorMode():
        yield
    triton.plan.cache_clear()
    triton.shares.cache_clear()


@pytest.mark.parametrize("ratio", [0.5, 0.0])
@pytest.mark.parametrize(("B", "launches"), [(1, 2), (8, 3), (64, 3)])
@pytest.mark.parametrize("asked", ASKED[:2])
@pytest.mark.backends("reference")
def test_launches_follow_from_shapes_and_the_host_never_waits(
    backend: str,
    asked: str,
    B: int,
    launches: int,
    ratio: float,
    monkeypatch: pytest.MonkeyPatch,
    _fake_gpu: None,
) -> None:
    started: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            assert min(grid) > 0 and max(grid[1:]) <= MAX_GRID
            return lambda *arguments, **constants: started.append(self._name)

    kernels = importlib.import_module("hitsr_fast.kernels.residual_decode_backward")
    names = {name for name in vars(kernels) if name.endswith("_kernel")}
    for name in names:
        monkeypatch.setattr(kernels, name, Kernel(name))
    sides = MODELS["hit-d16"].scales
    flat, phi = [side for scale in sides for side in (scale, scale)], phi_table(len(sides))
    new = functools.partial(torch.empty, device="cuda")
    with pytest.raises(Exception, match="local_scalar_dense"):
        new(1).item()
    found = triton.residual_decode_backward_triton(
        *(new(B, 32, 32, 32), new(10 if asked == "each" else 0, B, 32, 32, 32)),
        new(B, 3452, dtype=torch.int64),
        *(new(4096, 32), new(4, 32, 32, 3, 3), flat, phi, ratio),
    )
    assert [x.device.type for x in found] == ["cuda"] * 3
    with_phi = ["phi", "weight", "bias"] if ratio else []
    expected = ["reach", "across", "codes", *with_phi, *["runs"] * launches]
    assert started == [f"_residual_decode_backward_{name}_kernel" for name in expected]
    assert set(started) == names or not ratio


@pytest.mark.gpu
@pytest.mark.backends("triton")
@pytest.mark.parametrize("B", [1, 8, 64])
@pytest.mark.parametrize("asked", ASKED)
def test_on_a_gpu(backend: str, asked: str, B: int) -> None:
    """At HIT's size: as the definition on the CPU, the same bits again and again, and inside a graph."""
    sides = MODELS["hit-d16"].scales
    problem = {
        "size": (sides[-1], sides[-1]),
        "scales": [(side, side) for side in sides],
        "phi_index": phi_table(len(sides)),
        "phi_ratio": 0.5,
    }
    call = call_of(problem, asked, B=B, C=32, K=4096)
    skewed = call._replace(indices=torch.where(call.indices < 2048, 7, call.indices))
    for one in (call, skewed):
        expected = check(one)
        for _ in range(20):
            assert_same_bits(one.run(), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = one.run()
        for gradient in captured:
            gradient.fill_(torch.nan)
        for _ in range(3):
            graph.replay()
            assert_same_bits(captured, expected)
