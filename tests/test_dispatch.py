"""The choice of a backend: order, forcing, reasons; nothing falls back in silence."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from hitsr_fast import backends, dispatch, extension
from hitsr_fast.backends import Backend, Limit, Native, Reference
from hitsr_fast.dispatch import BackendUnavailableError, Op, explain, use_backend
from hitsr_fast.nn.prepared import CodebookCache
from hitsr_fast.ops import (
    attention_prologue,
    cached_attention,
    instruction_sets,
    modulated_layer_norm,
    nearest_code,
    prepare_codebook,
    sample_codes,
    scale_block_attention,
    use_instruction_set,
)

ONE, LONG = torch.ones(1), torch.ones(20)


def made(name: str, run: Callable[..., Any], reason: str | None = None, **options: Any) -> Backend:
    """A backend of any name, unavailable for a reason."""
    kind = type(name, (Backend,), {"name": name, "available": lambda self: reason})
    backend: Backend = kind(run, **options)
    return backend


def operation(*backends: Backend) -> Op:
    given: dict[str, Backend | None] = dict.fromkeys(dispatch.NAMES)
    return Op(
        "double(Tensor x) -> Tensor",
        given | {backend.name: backend for backend in backends},
        check=None,
        gradient=None,
        integer=False,
    )


def double(gpu_reason: str | None = "no GPU") -> Op:
    return operation(
        made("triton", lambda x: ("triton", 2 * x), gpu_reason),
        made("cpu", lambda x: ("cpu", 2 * x), limits=[Limit("N", 0, 10)]),
        Reference(lambda x: ("reference", x + x)),
    )


def test_takes_the_first_backend_that_can_run() -> None:
    assert double(None).run(ONE) == ("triton", 2)
    assert double().run(ONE) == ("cpu", 2)
    assert double().run(LONG)[0] == "reference"


def test_a_backend_may_leave_a_call_to_the_next_one_of_its_device() -> None:
    """Where that can run it; to the reference, which is slower by nature, it leaves none."""
    few = {"rather": lambda x: len(x) < 10}
    cuda, reference = made("cuda", lambda x: "cuda", **few), Reference(lambda x: "reference")
    both = operation(cuda, made("triton", lambda x: "triton"), reference)
    assert [both.run(x) for x in (ONE, LONG)] == ["triton", "cuda"]
    with use_backend("cuda"):
        assert both.run(ONE) == "cuda"
    without = operation(cuda, made("triton", lambda x: "triton", "not installed"), reference)
    assert without.run(ONE) == operation(cuda).run(ONE) == "cuda"
    last = operation(cuda, made("triton", lambda x: "triton", limits=[Limit("N", 0, 0)], **few), reference)
    assert last.run(ONE) == "cuda"


def test_what_is_explained_is_what_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = made("cuda", lambda x: "cuda", rather=lambda x: len(x) < 10)
    monkeypatch.setitem(dispatch._OPS, "double", operation(few, made("triton", lambda x: "triton")))
    for x, chosen in ((ONE, "triton"), (LONG, "cuda")):
        explain("double", x)
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "chosen" in line)
        assert line.startswith(chosen)


def test_forcing_takes_exactly_that_backend() -> None:
    with use_backend("reference"):
        assert double().run(ONE) == ("reference", 2)
        with use_backend("cpu"):
            assert double().run(ONE) == ("cpu", 2)
        with use_backend(None):
            assert double().run(ONE) == ("cpu", 2)
        assert double().run(ONE) == ("reference", 2)


@pytest.mark.parametrize(("forced", "x"), [("triton", ONE), ("cpu", LONG), ("cuda", ONE)])
def test_a_forced_backend_that_cannot_run_raises_with_every_reason(forced: str, x: Tensor) -> None:
    with use_backend(forced), pytest.raises(BackendUnavailableError) as caught:
        double().run(x)
    message = str(caught.value)
    assert f"double: forced backend '{forced}' cannot run this call" in message
    assert "no GPU" in message
    assert "not implemented for this op" in message
    assert ("needs N of at most 10, found 20" in message) == (x is LONG)


def test_no_backend_at_all_raises() -> None:
    with pytest.raises(BackendUnavailableError, match="no backend can run this call"):
        operation(made("triton", print, "no GPU")).run(ONE)


def test_environment_forces_and_the_context_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_BACKEND", "reference")
    assert double().run(ONE) == ("reference", 2)
    with use_backend("cpu"):
        assert double().run(ONE) == ("cpu", 2)
    monkeypatch.setenv("HITSR_FAST_BACKEND", "fastest")
    with pytest.raises(
        ValueError, match="HITSR_FAST_BACKEND: expected one of cuda, triton, flash_attn, cpu, reference"
    ):
        double().run(ONE)


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match="name: expected one of"), use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match="op: expected one of"):
        explain("nearest")


def test_an_exception_inside_a_backend_surfaces() -> None:
    def broken(x: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        operation(made("cpu", broken), Reference(lambda x: x)).run(ONE)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtypes": (torch.float16, torch.float32)}, "needs float16 or float32, found x of float64"),
        ({"limits": [Limit("N", -1, 0)]}, "needs N of at most 0, found 1"),
        ({"unless": lambda x: "another reason"}, "another reason"),
        ({"dtypes": (torch.float32,), "any_dtype": ("x",)}, None),
    ],
)
def test_a_backend_says_why_not(options: dict[str, Any], reason: str | None) -> None:
    (backend,) = operation(made("triton", print, **options)).backends.values()
    assert backend.reason(ONE.double()) == reason


def test_a_native_backend_wants_tensors_of_the_cpu() -> None:
    (backend,) = operation(Native("_double")).backends.values()
    assert backend.refusal([ONE.to("meta")]) == "needs CPU tensors, found x on meta"


def test_the_choice_is_local_to_a_thread() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced_backend()))
        thread.start()
        thread.join()
        assert dispatch.forced_backend() == "reference"
    assert seen == [None]


def test_instruction_sets_are_listed_and_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    names = instruction_sets()
    assert names[-1] == "portable"
    for name in names:
        with use_instruction_set(name):
            assert backends.active_instruction_set() == name
        monkeypatch.setenv("HITSR_FAST_CPU_ISA", name)
        assert backends.active_instruction_set() == name
    with use_instruction_set(names[0]):
        assert backends.active_instruction_set() == names[0]
    unknown = pytest.raises(ValueError, match=r"name: expected one of .*, found 'mmx'")
    with unknown, use_instruction_set("mmx"):
        pass
    monkeypatch.setenv("HITSR_FAST_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"HITSR_FAST_CPU_ISA: expected one of .*, found 'mmx'"):
        backends.active_instruction_set()


def test_a_missing_extension_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "unavailable", lambda module="_C": "not built (a remedy)")
    extension.warn_once.cache_clear()
    x, codebook = torch.randn(4, 2), torch.randn(3, 2)
    with pytest.warns(RuntimeWarning, match=r"not built \(a remedy\)") as caught:
        nearest_code(x, codebook)
        nearest_code(x, codebook)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    extension.warn_once.cache_clear()
    with use_backend("reference"):
        nearest_code(x, codebook)  # as it was asked for
    nearest_code(x.double(), codebook.double())  # which the extension does not take either


def test_a_gradient_that_does_not_exist_is_refused() -> None:
    q = torch.randn(1, 1, 2, 4, requires_grad=True)
    with pytest.raises(
        RuntimeError, match=r"cached_attention: has no gradient; call it under torch\.no_grad"
    ):
        cached_attention(q, q, q, 1)
    with torch.no_grad():
        assert not cached_attention(q, q, q, 1).requires_grad
    with pytest.raises(NotImplementedError, match="cached_attention: a gradient is not implemented"):
        torch.ops.hitsr_fast.cached_attention(q, q, q, 1, 0.5).sum().backward()


class Seen(TorchDispatchMode):
    """The names of what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_pytorch_is_asked_only_where_it_must_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes, gradients, subclasses and lazily negated tensors take the way through `torch.ops`."""
    asked = []
    op = dispatch.operations()["modulated_layer_norm"]
    overload = op._overload
    monkeypatch.setattr(op, "_overload", lambda *args: (asked.append(1), overload(*args))[1])
    x, row = torch.randn(1, 3, 4), torch.randn(1, 4)
    plain = modulated_layer_norm(x, row, row)
    with torch.no_grad():
        leaf = x.clone().requires_grad_()
        assert torch.equal(modulated_layer_norm(leaf, row, row), plain)
    with torch.inference_mode():
        assert torch.equal(modulated_layer_norm(x.clone(), row, row), plain)
    assert not asked

    with Seen() as seen:
        assert torch.equal(modulated_layer_norm(x, row, row), plain)
    assert "hitsr_fast::modulated_layer_norm" in seen.names
    assert len(asked) == 1
    assert modulated_layer_norm(leaf, row, row).requires_grad
    assert len(asked) == 2
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg()
    assert torch.equal(modulated_layer_norm(negated, row, row), plain)
    assert len(asked) == 3

    class Subclass(torch.Tensor):
        pass

    assert isinstance(modulated_layer_norm(x.as_subclass(Subclass), row, row), Subclass)


def test_meta_tensors_have_shapes() -> None:
    x, row = torch.zeros(2, 3, 4, device="meta"), torch.zeros(2, 4, device="meta")
    assert modulated_layer_norm(x, row, row).shape == (2, 3, 4)
    assert nearest_code(x[0], x[0]).shape == (3,)
    caches = [torch.zeros(2, 5, 1, 2, device="meta") for _ in range(2)]
    assert attention_prologue(torch.zeros(2, 3, 6, device="meta"), *caches, 1).shape == (2, 3, 1, 2)


def test_numbers_of_numpy_are_pythons() -> None:
    logits = torch.randn(200, 50)
    for options in ({"top_p": np.float16(0.5)}, {"temperature": np.float16(0.7)}, {"top_k": np.int64(3)}):
        plain = {name: value.item() for name, value in options.items()}
        found, expected = (
            sample_codes(logits, **given, generator=torch.Generator().manual_seed(0))
            for given in (options, plain)
        )
        assert torch.equal(found, expected)


def test_packed_codebooks_follow_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codebook = torch.randn(9, 4), torch.randn(40, 4)
    with use_instruction_set("portable"):
        prepared = prepare_codebook(codebook)
    assert prepared.layout == "cpu:portable"
    used = []
    search = torch.ops.hitsr_fast._nearest_code_search
    monkeypatch.setattr(
        torch.ops.hitsr_fast, "_nearest_code_search", lambda *args: (used.append(args[-1]), search(*args))[1]
    )
    assert torch.equal(nearest_code(x, prepared), nearest_code(x, codebook))
    assert used == [instruction_sets()[0]] * 2
    cache = CodebookCache()
    with use_instruction_set("portable"):
        held = cache(codebook)
        assert held is not None and held.layout == "cpu:portable"
    again = cache(codebook)
    assert again is not None and again.layout == f"cpu:{instruction_sets()[0]}"


@pytest.mark.filterwarnings("ignore:hitsr_fast._C:RuntimeWarning")
def test_a_variable_that_forces_a_set_needs_no_extension_for_other_backends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extension, "unavailable", lambda module="_C": "not built (a remedy)")
    monkeypatch.setenv("HITSR_FAST_CPU_ISA", "avx2")
    x, row = torch.randn(1, 3, 4, requires_grad=True), torch.randn(1, 4)
    modulated_layer_norm(x, row, row).sum().backward()
    q = torch.randn(1, 3, 1, 4)
    with pytest.raises(RuntimeError, match=r"hitsr_fast._C: not built \(a remedy\)"):
        scale_block_attention(q, q, q, block_lengths=[3])


def test_writing_in_place_counts() -> None:
    caches = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    attention_prologue(torch.randn(1, 1, 6), *caches, 0)
    assert [cache._version for cache in caches] == [1, 1]
    with torch.inference_mode():
        uncounted = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
        q = attention_prologue(torch.randn(1, 1, 6), *uncounted, 0)
        assert cached_attention(q, *uncounted, 1).shape == (1, 1, 1, 2)


def test_backward_runs_under_what_was_forced_for_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    choose = Op.choose

    def recording(self: Op, *args: object) -> Backend:
        backend = choose(self, *args)
        chosen.append((self.name, backend.name, backends.forced_instruction_set()))
        return backend

    monkeypatch.setattr(Op, "choose", recording)
    q = torch.randn(1, 3, 1, 4, requires_grad=True)
    with use_backend("reference"), use_instruction_set("portable"):
        out = scale_block_attention(q, q, q, block_lengths=[1, 2])
    out.sum().backward()
    assert chosen == [
        ("scale_block_attention", "reference", "portable"),
        ("scale_block_attention_backward", "reference", "portable"),
    ]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_does_not_reach_inside_an_op(backend: str | None) -> None:
    """The reference is made of matrix products, which autocast would round to bfloat16."""
    x, codebook = torch.randn(64, 8), torch.randn(32, 8)
    q = torch.randn(1, 3, 1, 4)
    with use_backend(backend):
        outside = nearest_code(x, codebook), scale_block_attention(q, q, q, block_lengths=[1, 2])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = nearest_code(x, codebook), scale_block_attention(q, q, q, block_lengths=[1, 2])
    for found, expected in zip(inside, outside, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")  # PyTorch's own
def test_forward_mode_derivatives_are_refused() -> None:
    """PyTorch would take them to be 0."""
    x, row = torch.randn(1, 3, 4), torch.randn(1, 4)
    with forward_ad.dual_level():
        modulated_layer_norm(x, row, row)
        with pytest.raises(
            NotImplementedError, match="modulated_layer_norm: forward-mode derivatives are not"
        ):
            modulated_layer_norm(forward_ad.make_dual(x, x), row, row)


def test_explain_prints_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dispatch._OPS, "double", double())
    explain("double", LONG)
    assert capsys.readouterr().out.splitlines() == [
        "cuda        not implemented for this op",
        "triton      no GPU",
        "flash_attn  not implemented for this op",
        "cpu         needs N of at most 10, found 20",
        "reference   can run  <- chosen",
    ]


def test_every_op_has_a_reference() -> None:
    for name, operation in dispatch.operations().items():
        assert operation.reasons()["reference"] is None, name


def test_the_docs_show_what_the_backends_say() -> None:
    """Where this fails, put the two tables of `dispatch.support_tables()` between the marks."""
    text = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    for mark, table in zip(("support", "kernels"), dispatch.support_tables(), strict=True):
        shown = text.partition(f"<!-- {mark} -->\n")[2].partition(f"<!-- /{mark} -->")[0]
        assert shown == table
