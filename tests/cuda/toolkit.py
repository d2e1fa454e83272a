"""csrc/cuda/nvcc.py, as setup.py has it, and the toolkit that it finds."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Those that the extension has code for, and later chips of their generations.
CHIPS = ["sm_80", "sm_90", "sm_100", "sm_120"]
LATER = ["sm_86", "sm_89", "sm_103", "sm_121"]
QUICK = ("sm_80", "sm_120")  # of which a compiler takes the least and the most registers
EVERY_CHIP = [
    chip if chip in QUICK else pytest.param(chip, marks=pytest.mark.slow) for chip in (*CHIPS, *LATER)
]
REGISTERS = 65536  # of a multiprocessor
SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "nvcc.py"


def load_nvcc() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nvcc", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nvcc"] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def toolkit_or_fail(nvcc: ModuleType) -> Any:
    toolkit = nvcc.find_toolkit()
    assert toolkit is not None, (
        "no nvcc: pip install 'cuda-toolkit[nvcc,cccl]', which is among the dev extras"
    )
    return toolkit


def resources(report: str, kernel: str) -> dict[tuple[str | int, ...], dict[str, int]]:
    """Of each kernel, what ptxas says that it takes, by the groups of a pattern of its mangled name."""
    found = {}
    for part in report.split("Compiling entry function ")[1:]:
        name = re.search(kernel, part)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        assert name and frame and used, part
        shared = re.search(r"(\d+) bytes smem", part)
        found[tuple(int(group) if group.isdigit() else group for group in name.groups())] = {
            "registers": int(used[1]),
            "spilled": sum(map(int, frame.groups())),
            "static shared": int(shared[1]) if shared else 0,
        }
    return found
