"""The kernels of the quantizer's gradient, compiled by nvcc for chips that are not here, and taken apart."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.cuda.toolkit import EVERY_CHIP, REGISTERS, resources, toolkit_or_fail

OP, THREADS, BLOCKS = "residual_decode_backward", 256, 2  # of a block, of a multiprocessor
KERNELS = {
    (stage, channels)
    for stage in ("AddUp", "TokenGradients", "SumRuns", "Combine")
    for channels in (8, 16, 32, 64)
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CUDA's compiler is for Linux here")


@pytest.mark.parametrize("target", EVERY_CHIP)
def test_nothing_is_spilled(nvcc: ModuleType, tmp_path: Path, target: str) -> None:
    """Nor is shared memory taken that the layout does not know."""
    report = nvcc.compile_kernels(
        toolkit_or_fail(nvcc), OP, f"-arch={target}", "-cubin", "-Xptxas=-v", out=tmp_path / "cubin"
    )
    found = resources(report, r"residual_decode_backward_kernelINS\d*_\d+([A-Za-z]+)ELi(\d+)E")
    assert set(found) == KERNELS
    for kernel, taken in found.items():
        assert taken["spilled"] == 0, (kernel, taken)
        assert taken["static shared"] == 0, (kernel, taken)
        assert taken["registers"] * THREADS * BLOCKS <= REGISTERS, (kernel, taken)


def test_what_the_kernels_are_made_of(nvcc: ModuleType, tmp_path: Path) -> None:
    """No atomics, which would make sums depend on who comes first; float32, not TF32; four floats at once."""
    out = tmp_path / "ptx"
    nvcc.compile_kernels(toolkit_or_fail(nvcc), OP, f"-arch={nvcc.PTX}", "-ptx", out=out)
    instructions = set(re.findall(r"^\s*(?:@%p\d+ )?([a-z]\w*(?:\.\w+)*)", out.read_text(), re.M))
    assert not [name for name in instructions if name.startswith(("atom", "red.", "mma", "wgmma", "cvt.rna"))]
    assert not [name for name in instructions if ".f64" in name or ".local" in name]
    assert {"fma.rn.f32", "bar.sync"} <= instructions
    assert any(name.startswith("ld.global") and ".v4" in name for name in instructions)
