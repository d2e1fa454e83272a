"""The kernels of the CUDA backend, compiled by nvcc for chips that are not here, and taken apart."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
from torch.utils.cpp_extension import include_paths

from tests.cuda.toolkit import CHIPS, EVERY_CHIP, REGISTERS, resources, toolkit_or_fail

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {(channels, ranks) for channels in (8, 16, 32, 64) for ranks in (1, 2)}
OP, THREADS = "residual_quantize", 256  # of a block

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CUDA's compiler is for Linux here")


@pytest.mark.parametrize("target", EVERY_CHIP)
def test_nothing_is_spilled(nvcc: ModuleType, tmp_path: Path, target: str) -> None:
    """Nor is shared memory taken that the plan of the launch does not know."""
    report = nvcc.compile_kernels(
        toolkit_or_fail(nvcc), OP, f"-arch={target}", "-cubin", "-Xptxas=-v", out=tmp_path / "cubin"
    )
    found = resources(report, r"residual_quantize_kernelILi(\d+)ELi(\d+)E")
    assert set(found) == KERNELS
    for (channels, ranks), taken in found.items():
        assert taken["spilled"] == 0, (channels, ranks, taken)
        assert taken["static shared"] == 0, (channels, ranks, taken)
        blocks = 1 if target in ("sm_120", "sm_121") else ranks  # where shared memory holds no two
        assert taken["registers"] * THREADS * blocks <= REGISTERS, (channels, ranks, taken)


def test_chips_are_those_of_the_extension(nvcc: ModuleType) -> None:
    assert tuple(CHIPS) == nvcc.TARGETS


def test_bindings_compile(nvcc: ModuleType) -> None:
    """Against the headers of a torch without CUDA too, whose stable ABI is the same."""
    torch_headers = [f"-isystem{folder}" for folder in include_paths()]
    options = ["-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-DUSE_CUDA=1", "-I", str(ROOT / "csrc")]
    options += ["-DTORCH_TARGET_VERSION=0x020a000000000000", '-DHITSR_FAST_CUDA_TARGETS="none"']
    headers = [
        f"-I{toolkit_or_fail(nvcc).include}",
        f"-isystem{sysconfig.get_path('include')}",
        *torch_headers,
    ]
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cpp")):
        done = subprocess.run(["c++", *options, *headers, str(source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_threads_do_not_lower_each_others_shared_memory(nvcc: ModuleType, tmp_path: Path) -> None:
    """Each device allows a kernel all it has, before the first launch; more than once where threads race."""
    toolkit, kernels, program = toolkit_or_fail(nvcc), tmp_path / "kernels.o", tmp_path / "launches"
    nvcc.compile_kernels(toolkit, OP, "-c", "-arch=sm_80", out=kernels)
    stub = ROOT / "tests" / "csrc" / "cuda_runtime_stub.cpp"
    command = [
        "c++",
        "-std=c++17",
        "-pthread",
        f"-I{toolkit.include}",
        str(stub),
        str(kernels),
        "-o",
        str(program),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launched = subprocess.run([program], capture_output=True, text=True)
    assert launched.returncode == 0
    lines = launched.stdout.splitlines()
    assert set(lines) == {"0 166912", "1 232448"} and len(lines) <= 8  # one a thread at most


def test_what_the_kernels_are_made_of(nvcc: ModuleType, tmp_path: Path) -> None:
    """Tensor cores with float32 sums screen; the definition, in float64, multiplies and adds in two steps."""
    out = tmp_path / "ptx"
    nvcc.compile_kernels(toolkit_or_fail(nvcc), OP, f"-arch={nvcc.PTX}", "-ptx", out=out)
    text = out.read_text()
    products = set(re.findall(r"\bmma\.\S+", text))
    assert products == {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"}
    assert "cp.async.cg.shared.global" in text
    assert "barrier.cluster.arrive" in text
    assert "mul.rn.f64" in text or "mul.f64" in text
    assert "fma.rn.f64" not in text


@pytest.mark.slow
def test_the_extension_builds_without_a_gpu(nvcc: ModuleType, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("torch is built without CUDA")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "hitsr_fast", "kernels", "csrc"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(source, tmp_path / name)
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": "/nonexistent", "HITSR_FAST_CUDA": "1", "PYTHONPATH": str(tmp_path)}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    code = """
from hitsr_fast import extension
import torch
assert extension.unavailable("_C_cuda") is None, extension.unavailable("_C_cuda")
print(extension.build_info("_C_cuda")["targets"])
for op in ("_residual_quantize_cuda", "_residual_decode_backward_cuda"):
    print(getattr(torch.ops.hitsr_fast, op).default._schema.name)
"""
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split("\n")[0] == " ".join(toolkit_or_fail(nvcc).targets)
    assert "hitsr_fast::_residual_quantize_cuda" in shown.stdout
    assert "hitsr_fast::_residual_decode_backward_cuda" in shown.stdout
