"""csrc/cuda/nvcc.py, as setup.py has it, and the toolkit that it finds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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
