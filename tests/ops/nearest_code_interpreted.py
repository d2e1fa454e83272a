"""The Triton backend of `nearest_code` on Triton's interpreter; test_nearest_code_triton.py runs this file.

Triton asks for its interpreter once, as kernels are defined: hence a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from hitsr_fast.dispatch import use_backend
from hitsr_fast.kernels import nearest_code as kernels
from hitsr_fast.ops import nearest_code, nearest_code_triton, prepare_codebook
from hitsr_fast.reference.nearest_code import nearest_code as reference
from tests.ops.test_nearest_code import KINDS, OP, brute_force, few_values, problem

SHIPPED = nearest_code_triton.recheck_constants
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def _backend() -> Any:
    """The backend, with rows that share a program: the interpreter is slow to start one."""

    def shared(channels: int, metric: str) -> dict[str, int]:
        return SHIPPED(channels, metric) | {"ROWS": 16}

    with use_backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest_code_triton, "recheck_constants", shared)
        yield


def check(x: Tensor, codebook: Tensor, metric: str) -> None:
    assert torch.equal(nearest_code(x, codebook, metric=metric), reference(x, codebook, metric))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_equals_the_definition(kind: str, metric: str) -> None:
    for rows, codes, channels in [(37, 150, 5), (20, 257, 33), (140, 16, 1)]:
        x, codebook = problem(kind, rows, codes, channels)
        for dtype in DTYPES if channels == 5 else DTYPES[:1]:
            a, b = x.to(dtype), codebook.to(dtype)
            if a.isfinite().all() and b.isfinite().all():  # float16 has no 1e30
                check(a, b, metric)


@pytest.mark.parametrize("channels", [*range(1, 41, 3), 100, 256])
def test_channels(channels: int) -> None:
    check(*problem("clustered", 9, 140, channels), "l2")


@given(problem=few_values(DTYPES))
def test_equals_exact_arithmetic(problem: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(nearest_code(*problem), brute_force(*problem))


def test_as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_code_triton, "recheck_constants", SHIPPED)
    for kind in ("clustered", "near ties"):
        for metric in ("l2", "cosine"):
            check(*problem(kind, 18, 140, 20), metric)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("workspace", "programs"), [(2**23, 1), (2**23, 512), (1, 3)])
def test_cuts_do_not_matter(
    metric: str, workspace: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in pieces, tiles shared out over programs, or all at once."""
    monkeypatch.setattr(nearest_code_triton, "_WORKSPACE", workspace)
    monkeypatch.setattr(nearest_code_triton, "_PROGRAMS", programs)
    x, codebook = problem("clustered", 2 * 300, 2 * 650, 6)
    check(x.view(2, 300, 6), codebook.view(2, 650, 6), metric)


def test_a_codebook_of_many_chunks_of_classes() -> None:
    x, codebook = problem("clustered", 8, 4300, 2)
    check(x, codebook, "l2")
    check(x, codebook[:1].expand(4300, 2), "l2")


def test_values_at_the_ends_of_the_range() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[largest, -largest], [1e-45, 0.0], [largest, largest], [-0.0, 1.0], [1.0, torch.nan]])
    codebook = torch.tensor(
        [[-largest, largest], [0.0, 0.0], [largest, -largest], [1e-45, 1e-45], [1.0, 1.0]]
    )
    for codes in (codebook, codebook[1:2], codebook[3:4] * torch.arange(1, 40)[:, None], codebook[1:]):
        check(x, codes, "l2")
        check(x, codes, "cosine")


def test_differences_beyond_float32() -> None:
    """3.5e38 apart in one channel is nearer than 2.8e38 in two."""
    x = torch.tensor([[3e38, 0.0]])
    codebook = torch.tensor([[2e37, 2.8e38], [-5e37, 0.0]])
    assert nearest_code(x, codebook).tolist() == [1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_bad_row_gives_0_and_disturbs_no_other(bad: float, metric: str) -> None:
    x, codebook = torch.randn(9, 4), torch.randn(16, 4)
    x[4, 2] = bad
    check(x, codebook, metric)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_strides_maps_and_groups(metric: str) -> None:
    x, codebook = torch.randn(2, 6, 5, 7), torch.randn(40, 6)
    expected = reference(x.movedim(1, 3).reshape(-1, 6), codebook, metric).view(2, 5, 7)
    for view in (x, x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert torch.equal(nearest_code(view, codebook, metric=metric), expected)  # type: ignore[arg-type]
    cut = nearest_code(x[:, :, 1:4, 2:], codebook, metric=metric)  # type: ignore[arg-type]
    assert torch.equal(cut, expected[:, 1:4, 2:])
    check(torch.randn(5, 12).T, torch.randn(9, 5).to(torch.bfloat16), metric)
    check(torch.randn(3, 10, 4), torch.randn(3, 8, 4), metric)
    for x, codebook in [(torch.zeros(0, 4), torch.zeros(2, 4)), (torch.zeros(0, 3, 4), torch.zeros(0, 2, 4))]:
        check(x, codebook, metric)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_prepared_codebooks(metric: str) -> None:
    x, codebook = torch.randn(9, 6), torch.randn(40, 6)
    prepared = prepare_codebook(codebook, metric=metric)  # type: ignore[arg-type]
    assert prepared.layout == nearest_code_triton.LAYOUT
    parts = list(prepared.parts)
    for backend in ("triton", "cpu", "reference"):  # each takes its own packed form, or none
        with use_backend(backend):
            found = nearest_code(x, prepared, metric=metric)  # type: ignore[arg-type]
        assert torch.equal(found, reference(x, codebook, metric))
    torch.library.opcheck(OP, (x, codebook, parts, prepared.layout, metric))
    assert torch.equal(
        nearest_code_triton.nearest_code_triton(x, codebook, [], "cpu:portable", metric),
        reference(x, codebook, metric),
    )


class Launch:
    """In place of a kernel: remembers what it was started with."""

    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] = ()

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def start(*arguments: Any, **constants: Any) -> None:
            self.arguments = arguments

        return start


def share_of_the_bound(x: Tensor, codebook: Tensor, metric: str) -> float:
    """The largest error of the screen's minima over the bound that the kernel computed for it."""
    _, parts = nearest_code_triton.prepare(codebook, metric)
    mean, _, _, _, bounds = parts
    recheck = Launch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_nearest_code_recheck_kernel", recheck)
        nearest_code_triton.nearest_code_triton(x, codebook, list(parts), nearest_code_triton.LAYOUT, metric)
    minima, margins = recheck.arguments[3:5]
    rows, codes = x.shape[0], codebook.shape[0]
    minima = minima.view(-1, rows, 4).movedim(1, 0).flatten(1)[:, : -(-codes // 32)]
    slack = margins.view(3, rows)[0]
    assert (slack >= 0).all()

    before, after = bounds[0, :2].double()
    centre = mean.double() / before
    centred = (x.double() - centre) * (before * after)
    given = codebook.double()
    if metric == "cosine":
        given = torch.nn.functional.normalize(given, dim=1)
    given = given - (given.mean(0).float().double() if metric == "cosine" else centre)
    given = given * (before * after)
    half_norms = 0 if metric == "cosine" else given.square().sum(1) / 2
    scores = half_norms - centred @ given.T
    padded = torch.nn.functional.pad(scores, (0, -codes % 32), value=torch.inf)
    exact = padded.view(rows, -1, 32).amin(2)
    return ((minima - exact).abs() / (slack[:, None].double() / 2)).max().item()


# Rows of 1e30 are beyond the range of the bound for cosine, where only codes are brought to a scale.
BOUNDED = [(m, kind) for m in ("l2", "cosine") for kind in KINDS if (m, kind) != ("cosine", "huge")]


@pytest.mark.parametrize(("metric", "kind"), BOUNDED)
def test_the_bound_holds(metric: str, kind: str) -> None:
    """Rounding to float16 is the kernel's own; sums are the interpreter's, in float32."""
    for channels in (3, 16, 40):
        assert share_of_the_bound(*problem(kind, 40, 200, channels), metric) <= 1


def test_the_bound_is_not_idle() -> None:
    assert share_of_the_bound(*problem("random", 100, 300, 3), "l2") > 0.1


def test_values_that_float16_drops() -> None:
    """One code far out makes all others subnormal; a row of mixed magnitudes loses its small values."""
    x, codebook = torch.randn(40, 5), torch.randn(200, 5) * 2.0**-14
    codebook[3] *= 2.0**20
    x[:, 1] *= 2.0**-30
    assert share_of_the_bound(x, codebook, "l2") <= 1
    check(x, codebook, "l2")


@pytest.fixture(params=["Ampere", "Hopper", "Blackwell", "CDNA3"])
def _tensor_core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Products as a chip's tensor cores sum them, by a bit-accurate model; of each, whether it shows."""
    from mmasim import amd, nv_ptx

    depth, multiply = {
        "Ampere": (16, lambda: nv_ptx.MMA("Ampere", "m16n8k16.f32.f16.f16.f32")),
        "Hopper": (16, lambda: nv_ptx.WGMMA("Hopper", "m64n64k16.f32.f16.f16")),
        "Blackwell": (16, lambda: nv_ptx.TCGen05MMA("Blackwell", "m128n64k16.kind::f16.f32.f16.f16")),
        "CDNA3": (8, lambda: amd.MFMA("CDNA3", "f32_32x32x8_f16")),
    }[request.param]
    instruction = multiply()
    interpreted, differs = InterpreterBuilder.create_dot, []

    def dot(self: InterpreterBuilder, a: Any, b: Any, d: Any, *rest: object) -> TensorHandle:
        left, right, total = (torch.from_numpy(np.array(operand.data)) for operand in (a, b, d))
        for first in range(0, left.shape[1], depth):
            total = instruction(left[:, first : first + depth], right[first : first + depth], total)
        differs.append(not np.array_equal(total.numpy(), interpreted(self, a, b, d, *rest).data))
        return TensorHandle(total.numpy(), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    return differs


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "kind"), BOUNDED)
def test_the_bound_holds_on_tensor_cores(metric: str, kind: str, _tensor_core: list[bool]) -> None:
    for channels in (8, 32, 100):
        x, codebook = problem(kind, 64, 300, channels)
        assert share_of_the_bound(x, codebook, metric) <= 1
        check(x, codebook, metric)
    assert any(_tensor_core) or kind == "equal"
