"""The choice of a backend: order, forcing, reasons; nothing falls back in silence."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.autograd import forward_ad

from hitsr_fast import dispatch
from hitsr_fast.dispatch import Backend, BackendUnavailableError, Operation, explain, use_backend
from hitsr_fast.ops import modulated_layer_norm, nearest_code, scale_block_attention


def _operation(gpu_reason: str | None = "no GPU") -> Operation:
    return Operation(
        "double",
        [
            Backend("triton", lambda x: ("triton", 2 * x), available=lambda: gpu_reason),
            Backend("cpu", lambda x: ("cpu", 2 * x), lambda x: None if x < 10 else "x is too large"),
            Backend("reference", lambda x: ("reference", x + x)),
        ],
    )


def test_takes_the_first_backend_that_can_run() -> None:
    assert _operation(None)(1) == ("triton", 2)
    assert _operation()(1) == ("cpu", 2)
    assert _operation()(20) == ("reference", 40)


def test_forcing_takes_exactly_that_backend() -> None:
    with use_backend("reference"):
        assert _operation()(1) == ("reference", 2)
        with use_backend("cpu"):
            assert _operation()(1) == ("cpu", 2)
        with use_backend(None):
            assert _operation()(1) == ("cpu", 2)
        assert _operation()(1) == ("reference", 2)


@pytest.mark.parametrize(("forced", "x"), [("triton", 1), ("cpu", 20), ("cuda", 1)])
def test_a_forced_backend_that_cannot_run_raises_with_every_reason(forced: str, x: int) -> None:
    with use_backend(forced), pytest.raises(BackendUnavailableError) as caught:
        _operation()(x)
    message = str(caught.value)
    assert f"double: forced backend '{forced}' cannot run this call" in message
    assert "no GPU" in message
    assert "not implemented for this op" in message
    assert ("x is too large" in message) == (x == 20)


def test_no_backend_at_all_raises() -> None:
    with pytest.raises(BackendUnavailableError, match="no backend can run this call"):
        Operation("nothing", [Backend("triton", print, available=lambda: "no GPU")])(1)


def test_environment_forces_and_the_context_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_BACKEND", "reference")
    assert _operation()(1) == ("reference", 2)
    with use_backend("cpu"):
        assert _operation()(1) == ("cpu", 2)
    monkeypatch.setenv("HITSR_FAST_BACKEND", "fastest")
    with pytest.raises(
        ValueError, match="HITSR_FAST_BACKEND: expected one of cuda, triton, flash_attn, cpu, reference"
    ):
        _operation()(1)


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ValueError, match="name: expected one of"), use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match="name: expected one of"):
        Backend("gpu", print)
    with pytest.raises(ValueError, match="op: expected one of"):
        explain("nearest")


def test_an_exception_inside_a_backend_surfaces() -> None:
    def broken(x: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Operation("broken", [Backend("cpu", broken), Backend("reference", lambda x: x)])(1)


def test_the_choice_is_local_to_a_thread() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced_backend()))
        thread.start()
        thread.join()
        assert dispatch.forced_backend() == "reference"
    assert seen == [None]


def test_backward_runs_under_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    choose = Operation.choose

    def recording(self: Operation, *args: object) -> Backend:
        backend = choose(self, *args)
        chosen.append((self.name, backend.name))
        return backend

    monkeypatch.setattr(Operation, "choose", recording)
    q = torch.randn(1, 3, 1, 4, requires_grad=True)
    with use_backend("reference"):
        out = scale_block_attention(q, q, q, block_lengths=[1, 2])
    out.sum().backward()
    assert chosen == [
        ("scale_block_attention", "reference"),
        ("scale_block_attention_backward", "reference"),
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
    monkeypatch.setitem(dispatch._OPERATIONS, "double", _operation())
    explain("double", 20)
    assert capsys.readouterr().out.splitlines() == [
        "cuda        not implemented for this op",
        "triton      no GPU",
        "flash_attn  not implemented for this op",
        "cpu         x is too large",
        "reference   can run  <- chosen",
    ]


def test_every_op_has_a_reference() -> None:
    for name, operation in dispatch.operations().items():
        assert operation.reasons()["reference"] is None, name
