"""Finds a CUDA toolkit and compiles the kernels with it; no GPU is needed. For setup.py and the tests."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Code of each runs on later chips of its generation too: on sm_86 and sm_89, sm_103, sm_121. Other chips from
# sm_90 on get theirs from PTX as the kernel is loaded, if their driver is as new as the compiler.
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
PTX = "compute_90"
# Products are fused into sums only where the source says so: the definition of nearest_code depends on it.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC")
KERNELS = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.cu"))}  # of each op


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its compiler, version, headers and runtime library, and what it can compile for."""

    nvcc: Path
    version: tuple[int, int]
    include: Path
    library: Path
    targets: tuple[str, ...]


def _candidates() -> Iterator[Path]:
    """Where nvcc may be: a toolkit that is named, one of pip's, one on the PATH, the usual place."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / "nvcc"
    packages = importlib.util.find_spec("nvidia")
    for location in (packages and packages.submodule_search_locations) or ():
        yield from sorted(Path(location).glob("cu*/bin/nvcc"))
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path)
    yield Path("/usr/local/cuda/bin/nvcc")


def find_toolkit(major: int | None = None) -> Toolkit | None:
    """The first complete toolkit that knows one of our targets, of one major version if that matters."""
    for nvcc in _candidates():
        if not nvcc.is_file():
            continue
        # The compiler itself says where the rest is: what is on the PATH may be a script.
        plan = _run(nvcc, "--dryrun", "-c", "any.cu").stderr
        release, targets = _run(nvcc, "--version").stdout, known_targets(_run(nvcc, "--list-gpu-code").stdout)
        top, version = re.search(r"^#\$ TOP=(.+)$", plan, re.M), re.search(r"release (\d+)\.(\d+)", release)
        if top is None or version is None or major not in (None, int(version[1])):
            continue
        root, runtime = Path(top[1]).resolve(), f"libcudart.so.{version[1]}"
        libraries = [folder for folder in (root / "lib64", root / "lib") if (folder / runtime).exists()]
        if (root / "include" / "cuda_runtime_api.h").is_file() and libraries and targets:
            return Toolkit(nvcc, (int(version[1]), int(version[2])), root / "include", libraries[0], targets)
    return None


def _run(*command: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def known_targets(listed: str) -> tuple[str, ...]:
    """What a compiler can compile for, by what its `--list-gpu-code` prints: of `TARGETS`, and PTX."""
    names = set(re.findall(r"\bsm_\d+\b", listed))
    known = tuple(target for target in TARGETS if target in names)
    return (*known, PTX) if PTX.replace("compute", "sm") in names else known


def architectures(targets: Sequence[str]) -> list[str]:
    """Options of nvcc for such targets, PTX among them."""
    return [f"-gencode=arch={target.replace('sm', 'compute')},code={target}" for target in targets]


def compile_kernels(toolkit: Toolkit, op: str, *options: str, out: Path) -> str:
    """Compiles an op's to `out` and returns what nvcc says.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    command = [str(toolkit.nvcc), *FLAGS, *options, "-o", str(out), str(KERNELS[op])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed: {' '.join(command)}\n{done.stdout}")
    return done.stdout
