"""`hitsr-fast info`: versions, devices, the C++ extension, and which backends each op has here."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass

from hitsr_fast.cli.options import setting_faults

_PACKAGES = ("torch", "triton", "numpy", "pillow", "safetensors")


@dataclass(frozen=True)
class Info:
    """Print versions, devices, the state of the C++ extension, and each op's backends.

    A backend that cannot run here stands with its reason.
    """

    def run(self) -> int:
        """Print, and return the exit code 0."""
        import torch

        from hitsr_fast import __version__, backends, dispatch, env, extension

        _section("versions")
        _row("hitsr_fast", __version__)
        _row("python", platform.python_version())
        for name in _PACKAGES:
            _row(name, _version(name))

        _section("devices")
        _row("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads, {_cpu_features()}")
        _row("cuda", _cuda_state())

        _section("extension")
        for module in extension.MODULES:
            reason = extension.unavailable(module)
            if reason is None:
                reason = ", ".join(f"{key} {value}" for key, value in extension.build_info(module).items())
            _row(f"hitsr_fast.{module}", reason)

        faults = setting_faults()
        if extension.unavailable() is None:
            _section("instruction sets of the CPU's kernels; one that is missing takes the next lower")
            _row("this machine", ", ".join(backends.instruction_sets()))
            wrong = "HITSR_FAST_CPU_ISA" in faults
            _row("active", "none, see settings" if wrong else backends.active_instruction_set())
            for name, sets in backends.kernel_sets().items():
                _row(name, ", ".join(sets))

        _section("settings")
        for name, value in (("HITSR_FAST_BACKEND", env.backend()), ("HITSR_FAST_CPU_ISA", env.cpu_isa())):
            _row(name, f"{value}: {faults[name]}" if name in faults else value or "not set")
        _row("cache", str(env.cache_dir()))

        for name, operation in dispatch.operations().items():
            _section(f"op {name}")
            for backend, reason in operation.reasons().items():
                _row(backend, reason or "can run")
        return 0


def _section(title: str) -> None:
    print(f"\n{title}")


def _row(name: str, value: str) -> None:
    print(f"  {name:<20} {value}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_features() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _cuda_state() -> str:
    import torch

    if not torch.backends.cuda.is_built():
        return "torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no device found"
    count = torch.cuda.device_count()
    return ", ".join(torch.cuda.get_device_name(index) for index in range(count))
