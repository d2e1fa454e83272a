"""The CUDA kernels of the quantizer's gradient on the CPU: against the definition, and under sanitizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.shapes import MODELS
from hitsr_fast.dispatch import operations, use_backend
from hitsr_fast.ops import phi_table
from hitsr_fast.ops import residual_decode_backward_cuda as cuda
from tests.csrc import host_backward
from tests.csrc.host_backward import Problem, Result
from tests.csrc.host_kernel import (
    MEMORY,
    NEEDS_COMPILER,
    QUICK,
    RACED,
    REPORTED,
    THREADS,
    barriers,
    break_copy,
    build,
)
from tests.ops.backends import refusal, require
from tests.ops.residual_quantizer import problems
from tests.ops.test_residual_decode_backward import (
    ASKED,
    RECTANGLE,
    SQUARE,
    Call,
    Gradients,
    assert_same_bits,
    call_of,
    check,
)

SIDES = MODELS["hit-d16"].scales
HIT: dict[str, Any] = {
    "size": (SIDES[-1], SIDES[-1]),
    "scales": [(side, side) for side in SIDES],
    "phi_index": phi_table(len(SIDES)),
    "phi_ratio": 0.5,
}
OP = "residual_decode_backward"
FEW = 6  # blocks, so that each has several tiles
LEAST_SHARED = 101376  # bytes that a block may have on sm_86, sm_89 and sm_120; others have more

pytestmark = NEEDS_COMPILER


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("quick"), *QUICK, source=host_backward.SOURCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the files of one run after another."""
    return tmp_path_factory.mktemp("runs")


class OnHost(Call):
    """A call of the launcher, whose kernels the CPU runs."""

    program: Path
    folder: Path
    threads: int
    blocks: int
    found: Result

    @classmethod
    def of(cls, call: Call, program: Path, folder: Path, threads: int = 256, blocks: int = 768) -> OnHost:
        self = cls(*call)
        self.program, self.folder, self.threads, self.blocks = program, folder, threads, blocks
        return self

    def launch(self, *arguments: Any) -> Gradients:
        problem = Problem(*arguments, threads=self.threads, blocks=self.blocks)
        self.found = host_backward.run(self.program, problem, self.folder)
        return self.found.gradients

    def run(self) -> Gradients:
        with launched(self.launch):
            return cuda.residual_decode_backward_cuda(*self)


@contextmanager
def launched(launch: Callable[..., Gradients]) -> Iterator[None]:
    """The launcher, with something else in place of the op that starts the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.hitsr_fast, "_residual_decode_backward_cuda", launch, raising=False)
        yield


def problem_of(call: Call) -> Problem:
    """What the launcher hands to its op, for few blocks."""
    given: list[Problem] = []

    def launch(*arguments: Any) -> Gradients:
        given.append(Problem(*arguments, threads=64, blocks=FEW))
        return call.codebook, call.phi_weight, call.phi_weight

    with launched(launch):
        cuda.residual_decode_backward_cuda(*call)
    return given[0]


@given(problem=problems(sides=9), asked=st.sampled_from(ASKED), data=st.data())
def test_equals_the_definition(
    program: Path, folder: Path, problem: dict[str, Any], asked: str, data: st.DataObject
) -> None:
    C, threads = data.draw(st.sampled_from([(8, 64), (16, 64), (8, 256), (16, 256)]))
    B, K = data.draw(st.integers(1, 3), "B"), data.draw(st.sampled_from([1, 9, 300]), "K")
    check(OnHost.of(call_of(problem, asked, B=B, C=C, K=K), program, folder, threads))


@pytest.mark.parametrize(
    ("C", "asked", "blocks", "shared"), [(32, "each", 192, 58624), (64, "the last", 243, 85760)]
)
def test_the_shape_that_it_is_made_for(
    program: Path, tmp_path: Path, C: int, asked: str, blocks: int, shared: int
) -> None:
    call = OnHost.of(call_of(HIT, asked, B=1, C=C, K=4096), program, tmp_path)
    check(call)
    assert (call.found.blocks, call.found.work) == (blocks, 1)
    assert call.found.shared == shared <= LEAST_SHARED


def test_runs_of_codes_over_many_chunks(program: Path, folder: Path) -> None:
    """Sorted tokens are summed 64 at a time: codes end with such a chunk, fill some, or have them all."""
    problem = SQUARE | {"size": (8, 8), "scales": [(8, 8)] * 3, "phi_index": [0, 0, 1]}
    call = call_of(problem, C=8, K=7, B=4)
    runs = torch.tensor([64, 1, 63, 200, 120, 318, 2])
    for indices in (torch.arange(7).repeat_interleave(runs), torch.full((768,), 5)):
        call = call._replace(indices=indices[torch.randperm(768)].view(4, 192))
        found = check(OnHost.of(call, program, folder, 64))
        assert not found[0][indices.bincount(minlength=7) == 0].any()


def test_blocks_that_have_several_tiles(program: Path, folder: Path) -> None:
    """Each goes through some, and the last of a scale through fewer."""
    call = OnHost.of(call_of(SQUARE, C=8, B=5), program, folder, 64, FEW)
    check(call)
    assert (call.found.blocks, call.found.work) == (9, 8)


def test_images_do_not_change_the_order_of_sums(program: Path, folder: Path) -> None:
    call = OnHost.of(call_of(RECTANGLE, C=8, K=4, B=3), program, folder, 64)
    assert_same_bits(call.run(), call.run())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_launcher_takes_sixteen_bits_and_strides(program: Path, folder: Path, dtype: torch.dtype) -> None:
    call = call_of(RECTANGLE, C=8, dtype=dtype)
    found = check(OnHost.of(call, program, folder, 64))
    assert [gradient.dtype for gradient in found] == [dtype] * 3
    strided = [value.mT.contiguous().mT if isinstance(value, Tensor) else value for value in call]
    assert_same_bits(OnHost.of(Call(*strided), program, folder, 64).run(), found)


def test_an_empty_batch(program: Path, folder: Path) -> None:
    for gradient in OnHost.of(call_of(SQUARE, C=8, B=0), program, folder, 64).run():
        assert not gradient.any()


def sanitized() -> list[Call]:
    """Several tiles and chunks, tails everywhere, with gradients of each scale and without, phi and none."""
    problem = {"size": (9, 10), "scales": [(1, 2), (5, 4), (9, 10)], "phi_index": [0, 1, 0], "phi_ratio": 0.5}
    call = call_of(problem, B=2, C=16, K=3)
    return [call, call_of(problem | {"phi_ratio": 0.0}, "the last", C=8), call_of(problem, "each", C=8)]


def test_memory_and_arithmetic_are_clean(tmp_path: Path) -> None:
    program = build(tmp_path, *MEMORY, source=host_backward.SOURCE)
    for call in sanitized():
        check(OnHost.of(call, program, tmp_path, 64, FEW))


@pytest.mark.slow  # the quick run sees that a race would be found, and what memory holds
def test_threads_do_not_race(tmp_path: Path) -> None:
    """A thread of the system for each of the GPU's, watched by a sanitizer that sees what is not ordered."""
    program = build(tmp_path, *THREADS, source=host_backward.SOURCE)
    for call in sanitized():
        check(OnHost.of(call, program, tmp_path, 64, FEW))


def broken(folder: Path, path: Path, number: int) -> Path:
    break_copy(folder, path, number)
    return build(folder, *THREADS, root=folder, source=host_backward.SOURCE)


def test_a_removed_barrier_is_found(tmp_path: Path) -> None:
    path, number = next(found for found in barriers(OP) if found[0].name == "tokens.h")
    done = host_backward.execute(broken(tmp_path, path, number), problem_of(sanitized()[0]), tmp_path)
    assert done.returncode == REPORTED
    assert RACED in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "number"), list(barriers(OP)), ids=lambda value: getattr(value, "stem", value)
)
def test_every_removed_barrier_is_found(tmp_path: Path, path: Path, number: int) -> None:
    program = broken(tmp_path, path, number)
    assert any(
        host_backward.execute(program, problem_of(call), tmp_path).returncode != 0 for call in sanitized()
    )


def reason(
    C: int = 16,
    size: tuple[int, int] = (4, 4),
    scales: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> str | None:
    """Why a call on a GPU's tensors cannot run."""
    grad, scales = torch.empty(1, C, *size, device="cuda"), scales or [1, 1, *size]
    indices = torch.empty(1, 5, dtype=torch.int64, device="cuda")
    codes = torch.empty(5, C, dtype=dtype, device="cuda"), torch.empty(2, C, C, 3, 3, device="cuda")
    return refusal(OP, "cuda", grad, grad[None], indices, *codes, scales, [0] * (len(scales) // 2), 0.5)


def test_what_it_does_not_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.hitsr_fast, "_cuda_unloadable", lambda device: "", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert refusal(OP, "cuda", *call_of(SQUARE)) == "needs CUDA tensors, found grad on cpu"
    with FakeTensorMode():
        assert reason() is None
        assert reason(12) == "needs C of 8, 16, 32, 64, found 12"
        assert reason(dtype=torch.float64) == "needs float16, bfloat16 or float32, found codebook of float64"
        assert reason(scales=[1] * 64) is None
        assert reason(scales=[1] * 66) == "needs at most 32 scales, found 33"
        assert reason(64, (4, 90)) is None
        assert reason(64, (4, 91)) == "needs W of at most 90, found 91"
        sides = "needs height and width of at most 320 together, found 321"
        assert reason(8, (20, 300)) is None
        assert reason(8, (21, 300)) == reason(8, (4, 4), [300, 21]) == sides
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert reason() == "needs compute capability 8.0, found 7.5"


def test_the_launcher_looks_into_no_tensor() -> None:
    """Tensors of a GPU that have no values are enough for it."""
    with FakeTensorMode(), torch.device("cuda"), launched(lambda *args: args[4:7]):
        found = cuda.residual_decode_backward_cuda(*call_of(SQUARE, C=8, dtype=torch.bfloat16))
    assert [gradient.dtype for gradient in found] == [torch.bfloat16] * 3


def test_the_op_runs_it(program: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device in place that takes the CPU's tensors."""
    backend, call = operations()[OP].backends["cuda"], call_of(RECTANGLE, C=8)
    on_host = OnHost.of(call, program, folder)
    monkeypatch.setattr(backend, "available", lambda: None)
    monkeypatch.setattr(backend, "_misplaced", lambda tensor: None)
    monkeypatch.setattr(torch.ops.hitsr_fast, "_cuda_unloadable", lambda device: "", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with use_backend("cuda"), launched(on_host.launch):
        found = call.run()
    assert_same_bits(found, on_host.run())


@pytest.mark.gpu
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("C", [8, 16, 32, 64])
def test_a_gpu_gives_what_the_host_gives(program: Path, tmp_path: Path, C: int, asked: str) -> None:
    """The same code, so the same bits."""
    require("cuda")
    call = call_of(RECTANGLE, asked, C=C, K=3, B=5)
    on_gpu = Call(*(value.cuda() if isinstance(value, Tensor) else value for value in call))
    with use_backend("cuda"):
        found = on_gpu.run()
    expected = OnHost.of(call, program, tmp_path).run()
    assert_same_bits(tuple(gradient.cpu() for gradient in found), expected)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize(("B", "C"), [(1, 32), (64, 32), (8, 64)])
def test_a_gpu_repeats_itself_and_runs_in_a_graph(B: int, C: int, asked: str) -> None:
    require("cuda")
    with use_backend("cuda"), torch.device("cuda"):
        call = call_of(HIT, asked, B=B, C=C, K=4096)
        expected = check(call)
        for _ in range(300 // B):
            assert_same_bits(call.run(), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call.run()
        for scale in (1.0, 2.0):  # a power of two changes no digit
            call.grad.copy_(call.grad * scale)
            call.grad_per_scale.copy_(call.grad_per_scale * scale)
            graph.replay()
            expected_now = tuple(gradient * scale for gradient in expected)
            assert_same_bits(found, expected_now)  # type: ignore[arg-type]
