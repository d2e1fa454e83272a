"""The fixture `backend`: a test that takes it runs once on each backend.

One that takes `op` as well runs for each op that has the backend. `pytest.mark.backends("cpu", "triton")`
narrows the choice. Triton asks for its interpreter once, as kernels are defined: a process with
TRITON_INTERPRET=1 runs its cases, and nothing else of this folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hitsr_fast.dispatch import operations
from tests.ops.backends import BACKENDS, INTERPRETED, forced, on_gpu, require

EVERY = ("reference", "cpu", "triton")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("backends")
        chosen = EVERY if mark is None else mark.args
        names = [name for name in BACKENDS if name in chosen or name.partition(":")[0] in chosen]
        marks = {name: [pytest.mark.gpu] if on_gpu(name) else [] for name in names}
        if "op" in metafunc.fixturenames:
            params = [
                pytest.param(op, name, marks=marks[name])
                for op, operation in operations().items()
                for name in names
                if name.partition(":")[0] in operation.backends
            ]
            metafunc.parametrize(("op", "backend"), params, indirect=["backend"])
        else:
            params = [pytest.param(name, marks=marks[name]) for name in names]
            metafunc.parametrize("backend", params, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:
        kept, left = [], []
        for item in items:
            here = Path(__file__).parent in item.path.parents
            (left if here and _backend_of(item) != "triton" else kept).append(item)
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"))  # NumPy's, of NaN
        items[:] = kept
        config.hook.pytest_deselected(items=left)


def _backend_of(item: pytest.Item) -> str | None:
    return item.callspec.params.get("backend") if hasattr(item, "callspec") else None


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces a backend, and an instruction set of the CPU's, for all of a test."""
    require(request.param)
    with forced(request.param):
        yield request.param
