"""The public names of packages that import them on first use."""

from __future__ import annotations

from importlib import import_module

import pytest

import hitsr_fast


@pytest.mark.parametrize("package", ["hitsr_fast", "hitsr_fast.data", "hitsr_fast.train"])
def test_every_public_name_is_there(package: str) -> None:
    module = import_module(package)
    for name in module.__all__:
        found = getattr(module, name)
        assert name == "__version__" or (found.__name__ == name and found.__module__.startswith(package))
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing


def test_a_lazy_name_is_the_modules_own() -> None:
    from hitsr_fast.pipeline import HitSR

    assert hitsr_fast.HitSR is HitSR
