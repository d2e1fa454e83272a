"""csrc/cuda/nvcc.py for the tests of what it compiles."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.cuda.toolkit import load_nvcc


@pytest.fixture(scope="session")
def nvcc() -> ModuleType:
    return load_nvcc()
