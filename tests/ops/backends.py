"""The backends that ops are tested on: their names, why one cannot run here, and how one is forced."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from hitsr_fast import env
from hitsr_fast.dispatch import operations, use_backend
from hitsr_fast.ops import (
    instruction_sets,
    nearest_code_triton,
    residual_decode_backward_triton,
    residual_quantize_triton,
    scale_block_attention_triton,
    use_instruction_set,
)

INSTRUCTION_SETS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "portable")
BACKENDS = ("reference", *(f"cpu:{isa}" for isa in INSTRUCTION_SETS), "triton", "cuda")
INTERPRETED = env.triton_interpret()

T = TypeVar("T")
fewer_when_interpreted = settings(max_examples=8 if INTERPRETED else 25)


def on_gpu(backend: str) -> bool:
    """Whether a backend runs on a GPU in this process."""
    return backend == "cuda" or (backend == "triton" and not INTERPRETED)


def missing(backend: str) -> str | None:
    """Why a backend cannot run on this machine, or None."""
    name, _, isa = backend.partition(":")
    reason = operations()["residual_quantize"].reasons()[name]  # the op that has them all
    if reason is None and isa and isa not in instruction_sets():
        return "this machine lacks it"
    if reason is None and isa and env.cpu_isa() not in (None, isa):
        return f"HITSR_FAST_CPU_ISA holds this run to {env.cpu_isa()}"
    return reason


def refusal(op: str, backend: str, *args: Any) -> str | None:
    """Why a backend cannot run a call with such arguments, whatever the machine."""
    return operations()[op].backends[backend].refusal(args)


def require(backend: str) -> None:
    """Skip a test of a backend that cannot run, with its reason; HITSR_TEST_REQUIRE makes that a failure.

    It names "cpu", "triton" or both, with a comma. An instruction set that the processor lacks is never a
    failure, nor is a GPU: Triton's interpreter, a process of its own, is what "triton" requires.
    """
    required = set(filter(None, os.environ.get("HITSR_TEST_REQUIRE", "").split(",")))
    if not required <= {"cpu", "triton"}:
        pytest.fail(f"HITSR_TEST_REQUIRE: expected cpu, triton or both, found {','.join(sorted(required))}")
    reason = missing(backend)
    if reason is not None:
        name = backend.partition(":")[0]
        failure = name in required and not on_gpu(backend) and missing(name) is not None
        (pytest.fail if failure else pytest.skip)(f"{backend}: {reason}")


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """`use_backend`, with its instruction set, and with tensors made on its GPU."""
    name, _, isa = backend.partition(":")
    with ExitStack() as stack:
        stack.enter_context(use_backend(name))
        if isa:
            stack.enter_context(use_instruction_set(isa))
        if on_gpu(backend):
            stack.enter_context(torch.device("cuda"))
        elif name == "triton":
            _help_the_interpreter(stack.enter_context(pytest.MonkeyPatch.context()))
        yield


# Block sizes of the launchers as they are; tests of those put them back.
SHIPPED = {
    (nearest_code_triton, "recheck_constants"): nearest_code_triton.recheck_constants,
    (residual_quantize_triton, "search_constants"): residual_quantize_triton.search_constants,
    (residual_quantize_triton, "update_constants"): residual_quantize_triton.update_constants,
    (residual_decode_backward_triton, "constants"): residual_decode_backward_triton.constants,
}


def _help_the_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Larger blocks, as it takes as long for a small one, and products of bfloat16, which it has not."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def enlarged(
        shipped: Callable[..., dict[str, int]], blocks: Callable[[dict[str, int]], dict[str, int]]
    ) -> Any:
        def constants(*arguments: Any) -> dict[str, int]:
            found = shipped(*arguments)
            return found | blocks(found)

        return constants

    large = {"BLOCK_P": 1024, "BLOCK_T": 128, "BLOCK": 4096}
    blocks = {
        "constants": lambda found: {name: large[name] for name in large.keys() & found},
        "recheck_constants": lambda found: {"ROWS": 16},
        "search_constants": lambda found: {
            **{"BLOCK_P": 16, "BLOCK_C": 16},
            **{"BLOCK_R": found["BLOCK_N"], "ROWS": found["BLOCK_N"]},
        },
        "update_constants": lambda found: {"ROWS": 8, "COLUMNS": 8, "BLOCK_S": 128},
    }
    for (module, name), shipped in SHIPPED.items():
        patch.setattr(module, name, enlarged(shipped, blocks[name]))

    dot = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    patch.setattr(InterpreterBuilder, "create_dot", create_dot)
    interpreted = scale_block_attention_triton._INTERPRETED
    patch.setattr(scale_block_attention_triton, "_INTERPRETED", (*interpreted, torch.bfloat16))


def sizes(backend: str, table: Mapping[str, Sequence[T]]) -> Sequence[T]:
    """What a table holds for a backend: "interpreted" is slow, a "gpu" has room; "any" is for the others."""
    kind = "gpu" if on_gpu(backend) else "interpreted" if backend == "triton" else "any"
    return table.get(kind, table["any"])


def placed(*tensors: Tensor) -> list[Tensor]:
    """Tensors that a generator of the CPU made, on the device of the backend."""
    return [tensor.to(torch.get_default_device()) for tensor in tensors]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
