"""The kernels of the CUDA backend, compiled by nvcc for chips that are not here, and taken apart."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.cuda.toolkit import load_nvcc, toolkit_or_fail

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {(channels, ranks) for channels in (8, 16, 32, 64) for ranks in (1, 2)}
REGISTERS, THREADS = 65536, 256  # of a multiprocessor, of a block

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CUDA's compiler is for Linux here")


@pytest.fixture(scope="module")
def nvcc() -> ModuleType:
    return load_nvcc()


def resources(report: str) -> dict[tuple[int, int], dict[str, int]]:
    """Of each kernel (channels, blocks of a cluster), what ptxas says that it takes."""
    found = {}
    for part in report.split("Compiling entry function ")[1:]:
        name = re.search(r"residual_quantize_kernelILi(\d+)ELi(\d+)E", part)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        assert name and frame and used, part
        shared = re.search(r"(\d+) bytes smem", part)
        found[int(name[1]), int(name[2])] = {
            "registers": int(used[1]),
            "spilled": sum(map(int, frame.groups())),
            "static shared": int(shared[1]) if shared else 0,
        }
    return found


@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_100a"])
def test_nothing_is_spilled(nvcc: ModuleType, tmp_path: Path, target: str) -> None:
    """Nor is shared memory taken that the plan of the launch does not know."""
    report = nvcc.compile_kernels(
        toolkit_or_fail(nvcc), f"-arch={target}", "-cubin", "-Xptxas=-v", out=tmp_path / "cubin"
    )
    found = resources(report)
    assert set(found) == KERNELS
    for (channels, ranks), taken in found.items():
        assert taken["spilled"] == 0, (channels, ranks, taken)
        assert taken["static shared"] == 0, (channels, ranks, taken)
        assert taken["registers"] * THREADS * ranks <= REGISTERS, (channels, ranks, taken)


def test_what_the_kernels_are_made_of(nvcc: ModuleType, tmp_path: Path) -> None:
    """Tensor cores with float32 sums screen; the definition, in float64, multiplies and adds in two steps."""
    out = tmp_path / "ptx"
    nvcc.compile_kernels(toolkit_or_fail(nvcc), f"-arch={nvcc.PTX}", "-ptx", out=out)
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
print(torch.ops.hitsr_fast._residual_quantize_cuda.default._schema.name)
"""
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split("\n")[0] == " ".join((*nvcc.TARGETS, nvcc.PTX))
    assert "hitsr_fast::_residual_quantize_cuda" in shown.stdout
