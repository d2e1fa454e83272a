"""When setup.py builds the CUDA extension, and that its failure costs nothing else."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py, with nothing set up."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setenv("HITSR_FAST_EXTENSION", "0")
    monkeypatch.delenv("HITSR_FAST_CUDA", raising=False)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.chdir(ROOT)
    spec.loader.exec_module(module)
    return module


def with_toolkit(script: ModuleType, monkeypatch: pytest.MonkeyPatch, toolkit: Any) -> list[int]:
    """Makes the search find this; returns the major versions that were looked for."""
    asked: list[int] = []

    def find_toolkit(major: int) -> Any:
        asked.append(major)
        return toolkit

    monkeypatch.setattr(script, "nvcc_module", lambda: SimpleNamespace(find_toolkit=find_toolkit))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return asked


@pytest.mark.parametrize(
    ("wanted", "gpu", "built"),
    [("", False, False), ("", True, True), ("0", True, False), ("1", False, True)],
)
def test_it_is_built_for_a_gpu_or_where_asked_for(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, wanted: str, gpu: bool, built: bool
) -> None:
    asked = with_toolkit(script, monkeypatch, "a toolkit")
    monkeypatch.setenv("HITSR_FAST_CUDA", wanted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert script.cuda_toolkit() == ("a toolkit" if built else None)
    assert asked == ([13] if built else [])


def test_what_was_asked_for_and_is_missing_is_an_error(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_toolkit(script, monkeypatch, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert script.cuda_toolkit() is None
    assert "no CUDA 13 toolkit" in capsys.readouterr().out
    monkeypatch.setenv("HITSR_FAST_CUDA", "1")
    with pytest.raises(RuntimeError, match="no CUDA 13 toolkit"):
        script.cuda_toolkit()
    monkeypatch.setenv("HITSR_FAST_CUDA", "yes")
    with pytest.raises(ValueError, match="HITSR_FAST_CUDA: expected 0 or 1, found 'yes'"):
        script.cuda_toolkit()


class Base:
    """In place of torch's build_ext."""

    def __init__(self, folder: Path) -> None:
        self.build_temp = str(folder)
        self.built: list[str] = []

    def build_extension(self, extension: Any) -> None:
        self.built.append(extension.name)


def test_a_compiler_that_fails_costs_the_cuda_extension_alone(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho unsupported host compiler\nexit 1\n")
    compiler.chmod(0o755)
    build = script.build_command(
        Base, SimpleNamespace(nvcc=compiler, targets=("sm_80", "sm_120", "compute_90"))
    )(tmp_path / "objects")
    modules = [SimpleNamespace(name=name) for name in ("hitsr_fast._C", "hitsr_fast._C_cuda")]
    for module in modules:
        build.build_extension(module)
    assert build.built == ["hitsr_fast._C"]
    assert "the CUDA extension is left out" in (said := capsys.readouterr().out)
    assert "unsupported host compiler" in said
    monkeypatch.setenv("HITSR_FAST_CUDA", "1")
    with pytest.raises(RuntimeError, match="unsupported host compiler"):
        build.build_extension(modules[1])


def test_kernels_are_compiled_once(script: ModuleType, tmp_path: Path) -> None:
    compiler, log = tmp_path / "nvcc", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n')
    compiler.chmod(0o755)
    build = script.build_command(
        Base, SimpleNamespace(nvcc=compiler, targets=("sm_80", "sm_120", "compute_90"))
    )(tmp_path / "objects")
    module = SimpleNamespace(name="hitsr_fast._C_cuda")
    for _ in range(2):
        build.build_extension(module)
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    assert len(sources) > 1
    for command, source, made in zip(
        log.read_text().splitlines(), sources, module.extra_objects, strict=True
    ):
        for option in (
            "arch=compute_80,code=sm_80",
            "arch=compute_120,code=sm_120",
            "arch=compute_90,code=compute_90",
        ):
            assert f"-gencode={option}" in command
        assert command.endswith(f"-o {made} {source}")
        assert Path(made).is_file()
    assert build.built == ["hitsr_fast._C_cuda"] * 2
