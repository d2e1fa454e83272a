"""Triton kernels are chosen, compiled and started for the device of their tensors, if there are several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hitsr_fast.backends import Launch
from hitsr_fast.dispatch import operations
from hitsr_fast.ops import scale_block_attention_triton as attention
from tests.kernels.aot import TARGETS
from tests.ops.test_contract import calls

LAUNCHED = [name for name, op in operations().items() if "triton" in op.backends]


class MixedMachine:
    """A machine of two GPUs of different kinds; `started` holds each launch's kernel, device and options."""

    chips = (TARGETS["sm_90"], TARGETS["gfx942"])

    def __init__(self) -> None:
        self.current = 0
        self.started: list[tuple[str, int, dict[str, Any]]] = []

    def exchange_device(self, device: int) -> int:
        before = self.current
        if device >= 0:
            self.current = device
        return before

    def get_current_target(self) -> GPUTarget:
        return self.chips[self.current]

    def get_current_device(self) -> int:
        return self.current

    def start(self, kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        self.started.append((kernel.fn.__name__, self.current, options))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[MixedMachine]:
    found = MixedMachine()
    monkeypatch.setattr(driver, "_active", found)
    monkeypatch.setattr(torch.cuda, "_exchange_device", found.exchange_device)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", found.exchange_device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # no graphs of our own
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **rest: found.start(self, *args, **rest))
    attention.block_table.cache_clear()
    yield found
    attention.block_table.cache_clear()  # of fake tensors


def on_second(value: Any) -> Any:
    """The same shape and strides on the second GPU."""
    if not isinstance(value, Tensor):
        return [on_second(item) for item in value] if isinstance(value, list) else value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:1")


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_launch_is_on_the_device_of_its_tensors(name: str, machine: MixedMachine) -> None:
    """While another device is the current one."""
    for args in calls(name):
        with FakeTensorMode():
            operations()[name].backends["triton"].run(*map(on_second, args))
    assert machine.started and {device for _, device, _ in machine.started} == {1}
    assert machine.current == 0


def test_without_its_guard_a_launch_would_be_on_the_current_device(machine: MixedMachine) -> None:
    """That the test above can fail."""
    launch = operations()["gated_residual"].backends["triton"]
    assert isinstance(launch, Launch)
    (args,) = calls("gated_residual")
    with FakeTensorMode():
        launch._launch(*map(on_second, args))
    assert [device for _, device, _ in machine.started] == [0]


@pytest.mark.parametrize(
    "name", ["scale_block_attention", "scale_block_attention_backward", "cached_attention"]
)
def test_tiles_are_those_of_the_device_of_the_tensors(name: str, machine: MixedMachine) -> None:
    (args,) = calls(name, large=True)
    with FakeTensorMode():
        operations()[name].backends["triton"].run(*map(on_second, args))
    kinds: dict[str, Callable[[dict[str, Any]], bool]] = {
        "_scale_block_attention_fwd_kernel": lambda options: tiles("forward", options),
        "_scale_block_attention_dkdv_kernel": lambda options: tiles("dkdv", options),
        "_scale_block_attention_dq_kernel": lambda options: tiles("dq", options),
        "_cached_attention_kernel": lambda options: tiles("decode", options) or tiles("forward", options),
    }
    found = [(kernel, options) for kernel, _, options in machine.started if kernel in kinds]
    assert found
    for kernel, options in found:
        assert kinds[kernel](options), (kernel, options)


def tiles(kind: str, options: dict[str, Any]) -> bool:
    """Whether these are the options of a kernel on the second chip, and on it alone."""
    first, second = (
        attention.constants(kind, torch.float32, options["D"], attention.family(chip.backend, chip.arch))
        for chip in MixedMachine.chips
    )
    assert first != second
    return all(options[key] == value for key, value in second.items() if key != "BLOCK_M")
