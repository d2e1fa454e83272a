"""What the CUDA backend says it takes is what the checks of its C++ take, whatever the tensors' strides."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from hitsr_fast import extension
from hitsr_fast.dispatch import operations
from hitsr_fast.ops import residual_decode_backward_cuda as backward
from hitsr_fast.ops import residual_quantize_cuda as cuda
from hitsr_fast.ops.packed_codebook import pack_eager
from tests.csrc.host_kernel import COMPILER, NEEDS_COMPILER, ROOT

pytestmark = NEEDS_COMPILER

DTYPES = {
    torch.float32: 6,
    torch.float16: 5,
    torch.bfloat16: 15,
    torch.int32: 3,
    torch.int64: 4,
}  # as ScalarType numbers them
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SCALES, K, P = [1, 2, 4, 3], 5, 2


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """The checks of the C++, as a function from the description of a call to "ok" or the error."""
    program = tmp_path_factory.mktemp("checks") / "given"
    headers = [f"-I{ROOT / 'csrc'}", *(f"-isystem{folder}" for folder in include_paths())]
    version = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    source = ROOT / "tests" / "csrc" / "cuda_arguments.cpp"
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    libraries += [f"-Wl,-rpath,{Path(torch.__file__).parent / 'lib'}"]
    command = [*COMPILER, "-std=c++17", "-O0", version, *headers, str(source), "-o", str(program), *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with subprocess.Popen(
        [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def ask(line: str) -> str:
            stdin.write(line + "\n")
            stdin.flush()
            return stdout.readline().rstrip("\n")

        yield ask
        stdin.close()


def described(tensor: Tensor | None) -> str:
    if tensor is None:
        return "0"
    numbers = [1, 0, DTYPES[tensor.dtype], tensor.data_ptr(), int(tensor.is_contiguous())]
    return " ".join(map(str, [*numbers, tensor.dim(), *tensor.shape]))


def listed(values: Sequence[int]) -> str:
    return " ".join(map(str, [len(values), *values]))


@pytest.fixture
def asked(checks: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the C++ says to the calls of the launchers, with a GPU in place that takes all that fits."""
    answers: list[str] = []

    def launch(*args: Any) -> tuple[Tensor, ...]:
        z, codebook, parts, phi_weight, phi_bias, scales, phi_index, _, replay, batch, size, _, _ = args
        tensors = [
            "residual_quantize",
            *map(described, (z, codebook, phi_weight, phi_bias, replay)),
            str(len(parts)),
        ]
        tensors += [*map(described, parts), *map(listed, (scales, phi_index, size)), str(batch)]
        answers.append(checks(" ".join(tensors)))
        return (torch.empty(0),) * 4

    def launch_backward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, scales, phi_index, ratio = args
        given = [*map(described, tensors), *map(listed, (scales, phi_index)), str(ratio)]
        answers.append(checks(" ".join(["residual_decode_backward", *given])))
        return (torch.empty(0),) * 3

    monkeypatch.setattr(torch.ops.hitsr_fast, "_residual_quantize_cuda", launch, raising=False)
    monkeypatch.setattr(
        torch.ops.hitsr_fast, "_residual_decode_backward_cuda", launch_backward, raising=False
    )
    monkeypatch.setattr(
        torch.ops.hitsr_fast, "_residual_quantize_cuda_plan", lambda *args: (1, 2**17), raising=False
    )
    monkeypatch.setattr(torch.ops.hitsr_fast, "_cuda_unloadable", lambda device: "", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(extension, "build_info", lambda module="_C": {"cuda": "13.0", "targets": "sm_90"})
    for name in ("residual_quantize", "residual_decode", "residual_decode_backward"):
        monkeypatch.setattr(operations()[name].backends["cuda"], "_misplaced", lambda tensor: None)
    return answers


@st.composite
def tensors(draw: st.DrawFn, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> Tensor:
    """A view of a flat buffer at any element, its axes in memory in any order, with room between them."""
    dtype, order = draw(st.sampled_from(dtypes)), draw(st.permutations(range(len(shape))))
    first, step = draw(st.integers(0, 9)), draw(st.sampled_from([1, 1, 1, 2, 3]))
    strides, stride = [0] * len(shape), step
    for axis in reversed(order):
        strides[axis] = stride
        stride *= max(shape[axis], 1)
    buffer = torch.zeros(first + stride + 1, dtype=dtype)
    return buffer.as_strided(tuple(shape), tuple(strides), first)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, tuple[Any, ...]]:
    C, B = draw(st.sampled_from([7, 8, 16, 32, 64])), draw(st.integers(0, 3))
    kind = draw(st.sampled_from(FLOATS))
    bank = [draw(tensors(shape, [kind])) for shape in ((K, C), (P, C, C, 3, 3), (P, C))]
    rest = SCALES, [1, 0], 0.5
    if draw(st.booleans()):
        indices = draw(tensors((B, 14), [torch.int64]))
        return "residual_decode", (indices, *bank, rest[0], rest[1], [4, 3], 0.5, True, False)
    z = draw(tensors((B, C, 4, 3), [*FLOATS, torch.float64]))
    layout, parts = pack_eager(bank[0], "l2") if draw(st.booleans()) else ("", ())
    if draw(st.booleans()):
        parts = tuple(draw(elsewhere(part)) for part in parts)
    replay = draw(st.none() | tensors((B, 2), [torch.int64]))
    return "residual_quantize", (z, *bank, list(parts), layout, *rest, replay, "l2", False, True)


@st.composite
def elsewhere(draw: st.DrawFn, part: Tensor) -> Tensor:
    """The same values in a flat buffer, as they are after all parts were put into one."""
    first = draw(st.integers(0, 9))
    buffer = torch.cat([part.new_zeros(first), part.flatten()])
    return buffer[first:].view(part.shape)


@given(call=calls())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_said_to_run_is_taken(asked: list[str], call: tuple[str, tuple[Any, ...]]) -> None:
    op, args = call
    reason = operations()[op].backends["cuda"].refusal(args)
    if reason is None:
        launcher = cuda.residual_quantize_cuda if op == "residual_quantize" else cuda.residual_decode_cuda
        launcher(*args)
        assert asked.pop() == "ok"
    else:
        aligned = "of the prepared codebook aligned to 16 bytes"
        assert reason == "needs C of 8, 16, 32, 64, found 7" or aligned in reason


@st.composite
def backward_calls(draw: st.DrawFn) -> tuple[Any, ...]:
    """Maps up to the limits and just beyond."""
    C, B = draw(st.sampled_from([7, 8, 16, 32, 64])), draw(st.integers(0, 2))
    W = draw(st.sampled_from([1, 3, 6144 // (C + 4), 6144 // (C + 4) + 1]))
    H = draw(st.sampled_from([1, 4, 320 - W, 321 - W]).filter(lambda side: side > 0))
    scales = [1, 1, *draw(st.sampled_from([(1, 1), (2, 318), (3, 318)])), H, W]
    scales = scales * draw(st.sampled_from([1, 10, 11]))
    tokens = sum(h * w for h, w in zip(scales[::2], scales[1::2], strict=True))
    each = draw(st.booleans()) and H * W < 100
    return (
        draw(tensors((B, C, H, W), FLOATS)),
        draw(tensors((len(scales) // 2 if each else 0, B, C, H, W), FLOATS)),
        draw(tensors((B, tokens), [torch.int64])),
        draw(tensors((K, C), FLOATS)),
        draw(tensors((P, C, C, 3, 3), FLOATS)),
        scales,
        [1] * (len(scales) // 2),
        draw(st.sampled_from([0.0, 0.5])),
    )


@given(args=backward_calls())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gradients_that_are_said_to_run_are_taken_and_no_others(
    asked: list[str], args: tuple[Any, ...]
) -> None:
    reason = operations()["residual_decode_backward"].backends["cuda"].refusal(args)
    if args[3].shape[1] == 7:  # which cannot be packed
        assert reason == "needs C of 8, 16, 32, 64, found 7"
    else:
        backward.residual_decode_backward_cuda(*args)
        assert (asked.pop() == "ok") is (reason is None)


def test_rows_of_odd_length_are_taken(asked: list[str]) -> None:
    """The second of two rows of five indices lies at 8 modulo 16."""
    bank = torch.zeros(K, 8), torch.zeros(1, 8, 8, 3, 3), torch.zeros(1, 8)
    indices = torch.zeros(2, 5, dtype=torch.int64)[1:]
    assert indices.data_ptr() % 16 == 8
    args = indices, *bank, [1, 1, 2, 2], [0, 0], [2, 2], 0.5, False, False
    assert operations()["residual_decode"].backends["cuda"].refusal(args) is None
    cuda.residual_decode_cuda(*args)
    assert asked == ["ok"]


def test_the_checks_can_refuse(checks: Callable[[str], str]) -> None:
    """Of what would be read as four values at once, an address that does not suit."""
    bank = torch.zeros(K, 8), torch.zeros(1, 9, 2, 8, 4), torch.zeros(1, 8)
    replay, sizes = torch.zeros(1, 5, dtype=torch.int64), "4 1 1 2 2 2 0 0 2 2 2 1"

    def ask(codebook: Tensor, weight: Tensor, bias: Tensor) -> str:
        return checks(
            " ".join(
                ["residual_quantize", "0", *map(described, (codebook, weight, bias, replay)), "0", sizes]
            )
        )

    assert ask(*bank) == "ok"
    shifted = torch.zeros(1 + bank[1].numel())[1:].view(bank[1].shape)
    assert ask(bank[0], shifted, bank[2]) == "phi_weight: expected data aligned to 16 bytes"
    assert "codebook: expected a contiguous tensor" in ask(torch.zeros(8, K).T, *bank[1:])
    assert "expected dtype" in ask(bank[0].half(), *bank[1:])
    assert ask(*bank[:2], torch.zeros(1, 4)) == "phi_bias: expected shape [1, 8], found [1, 4]"


def test_a_device_without_code_is_said(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As PTX of a new compiler is to an old driver."""
    from hitsr_fast import backends

    error = "the provided PTX was compiled with an unsupported toolchain."
    monkeypatch.setattr(torch.ops.hitsr_fast, "_cuda_unloadable", lambda device: error, raising=False)
    backends._unloadable.cache_clear()
    try:
        z, bank = torch.zeros(1, 8, 2, 2), (torch.zeros(K, 8), torch.zeros(1, 8, 8, 3, 3), torch.zeros(1, 8))
        args = z, *bank, [], "", [2, 2], [0], 0.5, None, "l2", False, False
        reason = operations()["residual_quantize"].backends["cuda"].refusal(args)
    finally:
        backends._unloadable.cache_clear()
    found = "found 9.0, with CUDA 13.0 for sm_90"
    assert reason == f"needs code that the device's driver takes, {found}: {error}"


@pytest.mark.parametrize(
    ("batch", "ranks", "count", "leaves"),
    [(1, 2, 132, True), (33, 2, 132, False), (65, 1, 132, True), (66, 1, 132, False), (9, 1, 16, False)],
)
def test_few_images_are_left_to_triton(
    monkeypatch: pytest.MonkeyPatch, batch: int, ranks: int, count: int, leaves: bool
) -> None:
    """A GPU whose multiprocessors would mostly be idle."""
    monkeypatch.setattr(
        torch.ops.hitsr_fast, "_residual_quantize_cuda_plan", lambda *args: (ranks, 2**17), raising=False
    )
    device = SimpleNamespace(multi_processor_count=count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda asked: device)
    bank = torch.zeros(K, 8), torch.zeros(1, 8, 8, 3, 3), torch.zeros(1, 8)
    z, indices = torch.zeros(batch, 8, 2, 2), torch.zeros(batch, 4, dtype=torch.int64)
    quantizing = z, *bank, [], "", [2, 2], [0], 0.5, None, "l2", False, False
    decoding = indices, *bank, [2, 2], [0], [2, 2], 0.5, False, False
    for op, args in (("residual_quantize", quantizing), ("residual_decode", decoding)):
        rather = operations()[op].backends["cuda"].rather
        assert rather is not None and rather(*args) is leaves
