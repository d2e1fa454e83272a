"""`preference_cross_entropy`: values and gradients by their formula, on every backend; bits, memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hitsr_fast.dispatch import use_backend
from hitsr_fast.ops import preference_cross_entropy
from tests.ops.backends import placed
from tests.tolerances import TOLERANCES

EXACT = TOLERANCES["float64_reordered"]._asdict()
Head = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]
SHAPES = [(1, 1, 1), (3, 5, 7), (19, 33, 130), (70, 24, 300)]


def problem(N: int, C: int, K: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> Head:
    torch.manual_seed(N + C + K)
    target, rejected = torch.randint(K, (2, N))
    rejected[::3] = target[::3]  # equal tokens
    own = torch.randn(K, dtype=dtype) if bias else None
    return torch.randn(N, C, dtype=dtype), torch.randn(K, C, dtype=dtype), own, target, rejected


def formula(head: Head, smoothing: float) -> tuple[Tensor, Tensor]:
    """In float64, with all logits."""
    hidden, weight, bias, target, rejected = head
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    loss = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
    rows = torch.arange(len(target))
    return loss, logits[rows, target] - logits[rows, rejected]


def gradients(results: tuple[Tensor, Tensor], head: Head, cotangents: tuple[Tensor, Tensor]) -> list[Tensor]:
    wanted = [tensor for tensor in head[:3] if tensor is not None]
    total = sum((r.double() * c.to(r.device)).sum() for r, c in zip(results, cotangents, strict=True))
    return [grad.double().cpu() for grad in torch.autograd.grad(total, wanted)]


def leaves(head: Head) -> Head:
    first = [None if t is None else t.detach().clone().requires_grad_() for t in head[:3]]
    return (*first, *head[3:])  # type: ignore[return-value]


def on_device(head: Head) -> Head:
    """Where the backend runs."""
    return tuple(t if t is None else placed(t)[0] for t in head)  # type: ignore[return-value]


def check(head: Head, smoothing: float, cotangents: tuple[Tensor, Tensor]) -> None:
    """Within twice the error that float32 logits have, plus a few roundings of the inputs' dtype."""
    wide = leaves(tuple(t if t is None or t.dtype == torch.int64 else t.double() for t in head))  # type: ignore[arg-type]
    expected = formula(wide, smoothing)
    slopes = gradients(expected, wide, cotangents)
    own = leaves(on_device(head))  # type: ignore[arg-type]
    found = preference_cross_entropy(*own, label_smoothing=smoothing)
    unit = torch.finfo(torch.float32).eps * head[0].shape[1] ** 0.5
    for result, value in zip(found, expected, strict=True):
        assert result.dtype == torch.float32
        bound = 16 * unit * (1 + value.abs().max().item())
        torch.testing.assert_close(result.double().cpu(), value, rtol=0, atol=bound)
    assert (found[1].cpu()[head[3] == head[4]] == 0).all(), "the gap of equal tokens"
    rounding = torch.finfo(head[0].dtype).eps + 64 * unit
    for gradient, value in zip(gradients(found, own, cotangents), slopes, strict=True):
        torch.testing.assert_close(gradient, value, rtol=0, atol=rounding * (1e-3 + value.abs().max().item()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(
    backend: str, shape: tuple[int, int, int], smoothing: float, bias: bool
) -> None:
    """Of means, which have one factor, and of rows that differ; of the loss alone and of the gap alone."""
    head, N = problem(*shape, bias=bias), shape[0]
    same, other, none = torch.full((N,), 1 / N), torch.randn(N), torch.zeros(N)
    for cotangents in ((same, none), (none, other), (same, other), (other, same)):
        check(head, smoothing, cotangents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_summed_in_float32(backend: str, dtype: torch.dtype) -> None:
    head = problem(19, 33, 130, dtype=dtype)
    check(head, 0.0, (torch.full((19,), 1 / 19), torch.randn(19)))


def test_far_logits_and_strides(backend: str) -> None:
    """Logits of some hundreds, where exp of one overflows; rows and columns that do not lie side by side."""
    hidden, weight, bias, target, rejected = problem(20, 16, 40)
    for factor in (1.0, 60.0):
        wide = (torch.stack([hidden, hidden], 1)[:, 0] * factor, weight.T.contiguous().T)
        check((*wide, bias, target, rejected), 0.0, (torch.ones(20), torch.ones(20)))


def test_no_rows(backend: str) -> None:
    head = leaves(on_device(problem(0, 4, 6)))
    loss, gap = preference_cross_entropy(*head)
    assert loss.shape == gap.shape == (0,)
    (loss.sum() + gap.sum()).backward()
    assert all(tensor is not None and not tensor.grad.any() for tensor in head[:3])  # type: ignore[union-attr]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(bias: bool, smoothing: float) -> None:
    hidden, weight, own, *tokens = problem(5, 3, 6, bias=bias, dtype=torch.float64)
    given = [t.requires_grad_() for t in (hidden, weight, own) if t is not None]

    def call(*tensors: Tensor) -> Any:
        head = (*tensors, *((None,) if len(tensors) == 2 else ()), *tokens)
        return preference_cross_entropy(*head, label_smoothing=smoothing)

    assert torch.autograd.gradcheck(call, given)


def test_a_second_backward_gives_the_same(backend: str) -> None:
    """The first may have used up what the forward had prepared."""
    head = leaves(on_device(problem(19, 33, 130)))
    loss, gap = preference_cross_entropy(*head)
    total = loss.mean() + 0.3 * gap.mean()
    first = torch.autograd.grad(total, head[:2], retain_graph=True)  # type: ignore[arg-type]
    second = torch.autograd.grad(total, head[:2])  # type: ignore[arg-type]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCES["float32_reordered"]._asdict())


@pytest.mark.backends("cpu")
def test_the_same_bits_on_any_number_of_threads(backend: str) -> None:
    head = problem(700, 40, 500)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            own = leaves(head)
            loss, gap = preference_cross_entropy(*own)
            for total in (loss.mean() + gap.mean(), (loss * torch.arange(700)).sum()):
                found.append([loss, gap, *torch.autograd.grad(total, own[:3], retain_graph=True)])  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
    for kind in (0, 1):
        for other in found[kind + 2 :: 2]:
            assert all(torch.equal(a, b) for a, b in zip(found[kind], other, strict=True))


_PEAK = """
import sys, torch
import torch.nn.functional as F
from benchmarks._machine import peak_extra_bytes
from hitsr_fast.ops import preference_cross_entropy
torch.set_num_threads(1)
N, C, K = map(int, sys.argv[2:])
hidden, weight, bias = torch.randn(N, C), torch.randn(K, C) * C**-0.5, torch.randn(K)  # no denormal gradient
hidden, weight, bias = (t.requires_grad_() for t in (hidden, weight, bias))
target, rejected = torch.randint(K, (2, N))
def run(hidden, target, rejected):
    if sys.argv[1] == "eager":
        logits = F.linear(hidden, weight, bias)
        rows = torch.arange(len(target))
        loss = F.cross_entropy(logits, target, reduction="none")
        gap = logits[rows, target] - logits[rows, rejected]
    else:
        loss, gap = preference_cross_entropy(hidden, weight, bias, target, rejected)
    (loss.mean() + F.softplus(-gap.mean())).backward()
run(hidden[:64], target[:64], rejected[:64])
hidden.grad, weight.grad, bias.grad = (torch.zeros_like(t) for t in (hidden, weight, bias))
print(peak_extra_bytes(lambda: run(hidden, target, rejected), torch.device("cpu")))
"""


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    "sizes", [(3452, 256, 4096), pytest.param((55232, 256, 4096), marks=pytest.mark.slow)], ids=str
)
def test_memory_is_a_tenth_of_that_of_logits(backend: str, sizes: tuple[int, int, int]) -> None:
    """Peak resident memory beside arguments and gradients, each in a process of its own."""
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", _PEAK, kind, *map(str, sizes)]))
        for kind in ("eager", "ours")
    ]
    assert peaks[0] >= 2 * 4 * sizes[0] * sizes[2]  # logits and their gradient are seen
    assert peaks[1] <= peaks[0] / 10


def test_compiles_and_is_a_good_op(backend: str) -> None:
    head = leaves(on_device(problem(6, 5, 9)))  # type: ignore[arg-type]
    compiled = torch.compile(preference_cross_entropy, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*head), preference_cross_entropy(*head), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCES["float32_reordered"]._asdict())


def test_float64_is_kept() -> None:
    head = problem(7, 5, 9, dtype=torch.float64)
    with use_backend("reference"):
        found = preference_cross_entropy(*head, label_smoothing=0.1)
    for result, value in zip(found, formula(head, 0.1), strict=True):
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, value, **EXACT)


def test_errors() -> None:
    hidden, weight, bias, target, rejected = problem(4, 3, 5)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"hidden": hidden[0]}, ValueError, "hidden"),
        ({"hidden": hidden[:, :0], "weight": weight[:, :0]}, ValueError, "hidden: expected C of at least 1"),
        ({"hidden": hidden.long()}, TypeError, "hidden"),
        ({"weight": weight[:, :2]}, ValueError, "weight"),
        ({"weight": weight[:0]}, ValueError, "weight: expected K of at least 1"),
        ({"bias": bias[:3]}, ValueError, "bias"),  # type: ignore[index]
        ({"target": target.int()}, TypeError, "target"),
        ({"target": target[:2]}, ValueError, "target"),
        ({"target": torch.full_like(target, 5)}, ValueError, "target"),
        ({"rejected": torch.full_like(target, -1)}, ValueError, "rejected"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing"),
    ]
    names = ("hidden", "weight", "bias", "target", "rejected")
    for changes, error, words in cases:
        given = dict(zip(names, (hidden, weight, bias, target, rejected), strict=True)) | changes
        with pytest.raises(error, match=words):
            preference_cross_entropy(**given)
