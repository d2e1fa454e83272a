"""`hitsr-fast info` prints what is there and, for what is not, the reason."""

from __future__ import annotations

import pytest
import torch

from hitsr_fast import __version__, backends, dispatch, extension
from hitsr_fast.cli import main
from hitsr_fast.cli.info import Info


def sections(text: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for block in text.strip().split("\n\n"):
        title, *rows = block.splitlines()
        found[title] = dict(row.strip().split(maxsplit=1) for row in rows)  # type: ignore[misc]
    return found


def test_every_op_and_backend_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert Info().run() == 0
    found = sections(capsys.readouterr().out)
    assert found["versions"]["hitsr_fast"] == __version__
    assert {title.removeprefix("op ") for title in found if title.startswith("op ")} == set(
        dispatch.operations()
    )
    for name, operation in dispatch.operations().items():
        assert found[f"op {name}"] == {
            backend: reason or "can run" for backend, reason in operation.reasons().items()
        }


@pytest.mark.parametrize("reason", ["not built (for a test)", None])
def test_state_of_the_extension(
    reason: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "unavailable", lambda module="_C": reason)
    monkeypatch.setattr(extension, "build_info", lambda module="_C": {"torch": "2.x", "cxx_standard": 202002})
    Info().run()
    shown = sections(capsys.readouterr().out)["extension"]
    assert shown == dict.fromkeys(
        ("hitsr_fast._C", "hitsr_fast._C_cuda"), reason or "torch 2.x, cxx_standard 202002"
    )


def test_settings_that_are_wrong_are_told_with_what_was_expected(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HITSR_FAST_BACKEND", "HITSR_FAST_CPU_ISA"):
        monkeypatch.setenv(name, "abacus")
    assert Info().run() == 0
    found = sections(capsys.readouterr().out)
    shown = found["settings"]
    assert (
        shown["HITSR_FAST_BACKEND"] == f"abacus: expected one of {', '.join(backends.NAMES)}, found 'abacus'"
    )
    known = ", ".join(() if extension.unavailable() else backends.instruction_sets())
    why = extension.unavailable() or f"abacus: expected one of {known}, found 'abacus'"
    assert shown["HITSR_FAST_CPU_ISA"].endswith(why)
    assert "op nearest_code" in found


def test_settings_that_are_not_set_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HITSR_FAST_BACKEND", "HITSR_FAST_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    Info().run()
    shown = sections(capsys.readouterr().out)["settings"]
    assert shown["HITSR_FAST_BACKEND"] == shown["HITSR_FAST_CPU_ISA"] == "not set"


def test_build_info_tells_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "unavailable", lambda module="_C": "not built")
    with pytest.raises(RuntimeError, match=r"hitsr_fast\._C: not built"):
        extension.build_info()


def test_the_extension_is_missing_for_a_reason_or_was_built_with_this_torch() -> None:
    reason = extension.unavailable()
    if reason is not None:
        assert reason.startswith(("not built", "built, but does not load"))
        return
    info = extension.build_info()
    assert str(info["torch"]).split("+")[0] == torch.__version__.split("+")[0]
    assert int(info["cxx_standard"]) >= 201703


def test_the_command_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["info"])
    assert caught.value.code == 0
    assert "op nearest_code" in capsys.readouterr().out


def test_an_unknown_command_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["enlarge"])
    assert caught.value.code == 2
    assert "enlarge" in capsys.readouterr().err
