"""The cache of a prepared codebook: it is never stale, whichever way the codebook was changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hitsr_fast.nn.prepared as module
from hitsr_fast.nn.prepared import CodebookCache
from hitsr_fast.ops import PreparedCodebook


def optimizer_step(layer: nn.Embedding) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def data_write(layer: nn.Embedding) -> None:
    layer.weight.data[3, 2] += 1


def data_swap(layer: nn.Embedding) -> None:
    layer.weight.data = torch.randn(9, 4)


def loading(layer: nn.Embedding) -> None:
    layer.load_state_dict({"weight": torch.randn(9, 4)})


def no_grad_write(layer: nn.Embedding) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def other_parameter(layer: nn.Embedding) -> None:
    layer.weight = nn.Parameter(torch.randn(9, 4))


CHANGES = [optimizer_step, data_write, data_swap, loading, no_grad_write, other_parameter]


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


def test_off_the_cpu_address_and_version_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing there is compared, for that would wait for the device. `meta` stands for one."""
    made: list[PreparedCodebook] = []

    def prepare(codebook: Tensor, *, metric: str) -> PreparedCodebook:
        made.append(PreparedCodebook(codebook.clone(), metric, "", ()))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(module, "prepare_codebook", prepare)
    parameter, cache = nn.Parameter(torch.zeros(9, 4, device="meta")), CodebookCache()
    cache(parameter)
    cache(parameter)
    assert len(made) == 1
    with torch.no_grad():
        parameter.add_(1)
    cache(parameter)
    cache(parameter)
    assert len(made) == 2
    other = nn.Parameter(torch.zeros(3))
    other.grad = torch.ones(3)
    torch.optim.AdamW([other]).step()
    cache(parameter)
    assert len(made) == 2
    torch.optim.AdamW([other], fused=True).step()  # counts no writes: it might have been this parameter
    cache(parameter)
    cache(parameter)
    assert len(made) == 3


def test_a_move_to_another_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, cache = nn.Embedding(9, 4), CodebookCache()
    cache(layer.weight)
    monkeypatch.setattr(
        module, "prepare_codebook", lambda codebook, metric: PreparedCodebook(codebook, metric, "", ())
    )
    moved = cache(layer.to("meta").weight)
    assert moved is not None and moved.codebook.device.type == "meta"


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

    def traced(codebook: Tensor) -> Tensor:
        found.append(cache(codebook))
        return codebook + 1

    torch.compile(traced, backend="eager", fullgraph=True)(torch.zeros(9, 4))
    assert found == [None]


def test_inference_tensors_count_no_versions() -> None:
    cache = CodebookCache()
    with torch.inference_mode():
        codebook = torch.zeros(9, 4)
        assert cache(codebook) is cache(codebook) is not None
        codebook += 1
        found = cache(codebook)
        assert found is not None and torch.equal(found.codebook, codebook)
        assert cache(torch.zeros(9, 4, device="meta")) is None
