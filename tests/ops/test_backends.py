"""What the fixture `backend` does with a backend that cannot run: a skip with its reason, or a failure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hitsr_fast import extension
from tests.ops import backends
from tests.ops.backends import INSTRUCTION_SETS, missing, require

ROOT = Path(__file__).parents[2]
TEST = "tests/ops/test_group_norm_silu.py"
# Tests as on a machine without a compiler.
WITHOUT_EXTENSION = """
import sys
import pytest
from hitsr_fast import extension
extension.unavailable = lambda module="_C": "not built"
sys.exit(pytest.main(sys.argv[1:]))
"""


def run(required: str) -> tuple[int, str]:
    command = [sys.executable, "-c", WITHOUT_EXTENSION, "-q", "-rs", "-p", "no:cacheprovider", TEST]
    command += ["-m", "not gpu", "-k", "test_memory_format_of_the_result"]
    environment = os.environ | {"HITSR_TEST_REQUIRE": required, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_without_the_extension_tests_are_skipped_with_the_reason() -> None:
    status, out = run("")
    assert status == 0, out
    assert re.search("1 passed, 5 skipped", out)
    assert all(f"cpu:{name}: not built" in out for name in INSTRUCTION_SETS)


def test_without_the_extension_tests_fail_where_it_is_required() -> None:
    status, out = run("cpu,triton")
    assert status == 1, out
    assert re.search("1 passed.*5 errors", out)
    assert "cpu:portable: not built" in out


def test_an_instruction_set_that_the_processor_lacks_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "unavailable", lambda module="_C": None)
    monkeypatch.setattr(backends, "instruction_sets", lambda: ["portable"])
    monkeypatch.setenv("HITSR_TEST_REQUIRE", "cpu")
    monkeypatch.delenv("HITSR_FAST_CPU_ISA", raising=False)
    assert missing("cpu:portable") is None
    with pytest.raises(pytest.skip.Exception, match="cpu:avx2: this machine lacks it"):
        require("cpu:avx2")
    monkeypatch.setattr(backends, "instruction_sets", lambda: ["avx2", "portable"])
    monkeypatch.setenv("HITSR_FAST_CPU_ISA", "avx2")
    assert missing("cpu:avx2") is None
    assert missing("cpu:portable") == "HITSR_FAST_CPU_ISA holds this run to avx2"


def test_a_gpu_is_never_required_and_the_interpreter_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "missing", lambda backend: "not there")
    monkeypatch.setenv("HITSR_TEST_REQUIRE", "triton")
    with pytest.raises(pytest.skip.Exception, match="triton: not there"):
        require("triton")
    monkeypatch.setattr(backends, "INTERPRETED", True)
    with pytest.raises(pytest.fail.Exception, match="triton: not there"):
        require("triton")


def test_an_unknown_requirement_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_TEST_REQUIRE", "cpu,gpu")
    with pytest.raises(
        pytest.fail.Exception, match="HITSR_TEST_REQUIRE: expected cpu, triton or both, found"
    ):
        require("reference")
