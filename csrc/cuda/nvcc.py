"""Finds a CUDA toolkit and compiles the kernels with it; no GPU is needed. For setup.py and the tests."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Code for each chip; others from sm_90 on get theirs from PTX as the kernel is loaded.
TARGETS = ("sm_80", "sm_90a", "sm_100a")
PTX = "compute_90"
# Products are fused into sums only where the source says so: the definition of nearest_code depends on it.
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC")
KERNELS = Path(__file__).parent / "residual_quantize.cu"


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its compiler, its version, and where its headers and its runtime library are."""

    nvcc: Path
    version: tuple[int, int]
    include: Path
    library: Path


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
    """The first complete toolkit there is, of one major version if that matters."""
    for nvcc in _candidates():
        if not nvcc.is_file():
            continue
        # The compiler itself says where the rest is: what is on the PATH may be a script.
        plan = subprocess.run([nvcc, "--dryrun", "-c", "any.cu"], capture_output=True, text=True).stderr
        release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        top, version = re.search(r"^#\$ TOP=(.+)$", plan, re.M), re.search(r"release (\d+)\.(\d+)", release)
        if top is None or version is None or major not in (None, int(version[1])):
            continue
        root, runtime = Path(top[1]).resolve(), f"libcudart.so.{version[1]}"
        libraries = [folder for folder in (root / "lib64", root / "lib") if (folder / runtime).exists()]
        if (root / "include" / "cuda_runtime_api.h").is_file() and libraries:
            return Toolkit(nvcc, (int(version[1]), int(version[2])), root / "include", libraries[0])
    return None


def architectures() -> list[str]:
    """Options of nvcc for all targets."""
    pairs = [(target.replace("sm", "compute"), target) for target in TARGETS] + [(PTX, PTX)]
    return [f"-gencode=arch={virtual},code={real}" for virtual, real in pairs]


def compile_kernels(toolkit: Toolkit, *options: str, out: Path) -> str:
    """Compiles to `out` and returns what nvcc says.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    command = [str(toolkit.nvcc), *FLAGS, *options, "-o", str(out), str(KERNELS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc failed: {' '.join(command)}\n{done.stdout}")
    return done.stdout
