"""The cache of a prepared codebook: it is never stale, whichever way the codebook was changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hitsr_fast.nn.prepared import CodebookCache


def optimizer_step(layer: nn.Embedding) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def fused_step(layer: nn.Embedding) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()


def data_write(layer: nn.Embedding) -> None:
    layer.weight.data[3, 2] += 1


def data_swap(layer: nn.Embedding) -> None:
    layer.weight.data = torch.randn(9, 4)


def write_from_outside(layer: nn.Embedding) -> None:
    layer.weight.detach().numpy()[3, 2] += 1


def loading(layer: nn.Embedding) -> None:
    layer.load_state_dict({"weight": torch.randn(9, 4)})


def no_grad_write(layer: nn.Embedding) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def other_parameter(layer: nn.Embedding) -> None:
    layer.weight = nn.Parameter(torch.randn(9, 4))


CHANGES = [
    *(optimizer_step, fused_step, data_write, data_swap, write_from_outside),
    *(loading, no_grad_write, other_parameter),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(change: Callable[[nn.Embedding], None]) -> None:
    layer, cache = nn.Embedding(9, 4), CodebookCache()
    first = cache(layer.weight)
    assert cache(layer.weight) is first
    change(layer)
    second = cache(layer.weight)
    assert second is not None and second is not first
    assert torch.equal(second.codebook, layer.weight)
    assert cache(layer.weight) is second


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_is_noticed(dtype: torch.dtype) -> None:
    layer, cache = nn.Embedding(9, 4), CodebookCache()
    nn.init.ones_(layer.weight)  # equal in value in each dtype
    cache(layer.weight)
    layer.to(dtype)
    prepared = cache(layer.weight)
    assert prepared is not None and prepared.codebook.dtype == dtype


def test_another_metric_is_noticed() -> None:
    codebook, cache = torch.randn(9, 4), CodebookCache()
    assert [cache(codebook, metric=metric).metric for metric in ("l2", "cosine")] == ["l2", "cosine"]  # type: ignore[union-attr,arg-type]


def test_off_the_cpu_nothing_is_kept() -> None:
    """Packing is part of each call there. `meta` stands for a device."""
    cache, layer = CodebookCache(), nn.Embedding(9, 4)
    assert cache(layer.weight) is not None
    assert cache(layer.to("meta").weight) is None


def test_copies_and_pickles_start_empty() -> None:
    codebook, cache = torch.randn(9, 4), CodebookCache()
    prepared = cache(codebook)
    for other in (copy.deepcopy(cache), copy.copy(cache), pickle.loads(pickle.dumps(cache))):
        found = other(codebook)
        assert found is not None and found is not prepared
        assert torch.equal(found.codebook, codebook)
    assert cache(codebook) is prepared


def test_tracers_are_left_alone() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    cache = CodebookCache()
    with FakeTensorMode():
        assert cache(torch.zeros(9, 4)) is None
    found = []

    def traced(codebook: torch.Tensor) -> torch.Tensor:
        found.append(cache(codebook))
        return codebook + 1

    torch.compile(traced, backend="eager", fullgraph=True)(torch.zeros(9, 4))
    assert found == [None]


def test_inference_tensors_are_compared_too() -> None:
    cache = CodebookCache()
    with torch.inference_mode():
        codebook = torch.zeros(9, 4)
        assert cache(codebook) is cache(codebook) is not None
        codebook += 1
        found = cache(codebook)
        assert found is not None and torch.equal(found.codebook, codebook)
