"""A wheel of this checkout, installed into a fresh environment and used from another folder."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hitsr_fast import __version__, extension

ROOT = Path(__file__).resolve().parents[1]
BUILD_INPUTS = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "hitsr_fast",
    "kernels",
    "csrc",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where ninja is
    environment = {**os.environ, "PATH": path, "HITSR_FAST_CUDA": "0", "HITSR_FAST_EXTENSION": "1"}
    subprocess.run([*pip, "--wheel-dir", str(out), str(source)], check=True, env=environment)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of a fresh environment with the wheel; what it depends on is borrowed from here."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    interpreter = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # A top-level `kernels` as another project installs it, ours must neither hide nor be hidden by it.
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("OWNER = 'another project'\n")
    # Read last, without its .pth files: an editable install of this checkout stays out of sight.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def _environment(**variables: str) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **variables}


def _run(python: Path, code: str) -> dict[str, object]:
    """Run code from / in the fresh environment; it prints one JSON object."""
    result = subprocess.run(
        [str(python), "-c", code], check=True, cwd="/", env=_environment(), capture_output=True, text=True
    )
    answer: dict[str, object] = json.loads(result.stdout)
    return answer


def test_wheel_holds_what_it_must(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert f"hitsr_fast-{__version__}-" in wheel.name
    data = [ROOT / "hitsr_fast" / "py.typed", *(ROOT / "hitsr_fast").glob("weights/**/*")]
    for path in [*data, *(ROOT / "hitsr_fast").glob("train/recipes/*.json")]:
        assert path.is_dir() or str(path.relative_to(ROOT)) in names, path
    for path in [*ROOT.glob("hitsr_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        inside = path.relative_to(ROOT)
        if inside.parts[0] == "kernels":
            inside = Path("hitsr_fast") / inside
        assert str(inside) in names, inside
    assert wheel.name.endswith("-cp310-abi3-linux_x86_64.whl")
    assert "hitsr_fast/_C.abi3.so" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "csrc/"))]


def test_wheel_works_from_another_folder(python: Path) -> None:
    answer = _run(
        python,
        """
import json
import hitsr_fast, hitsr_fast.kernels, hitsr_fast.kernels.nearest_code, kernels
from hitsr_fast import extension
from hitsr_fast.ops import nearest_code
import torch
print(json.dumps({
    "version": hitsr_fast.__version__,
    "file": hitsr_fast.__file__,
    "kernels": hitsr_fast.kernels.nearest_code.__file__,
    "path": len(hitsr_fast.kernels.__path__),
    "foreign": kernels.OWNER,
    "code": nearest_code(torch.ones(1, 2), torch.eye(2)).item(),
    "extension": extension.unavailable(),
}))
""",
    )
    site = str(python.parents[1])
    assert answer["version"] == __version__
    assert str(answer["file"]).startswith(site)
    assert str(answer["kernels"]).startswith(site)
    assert answer["path"] == 1
    assert answer["foreign"] == "another project"
    assert answer["code"] == 0
    assert answer["extension"] is None


def test_info_in_a_fresh_environment(python: Path) -> None:
    command = [str(python), "-c", "from hitsr_fast.cli import main; main()", "info"]
    done = subprocess.run(command, cwd="/", env=_environment(), capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    said = dict(row for row in rows if len(row) == 2)
    assert said["hitsr_fast"] == __version__
    assert said["torch"] == torch.__version__.split("+")[0]
    assert said["hitsr_fast._C"].startswith(f"torch {said['torch']}, compiler ")


def test_the_extension_takes_the_stable_abi_alone(wheel: Path, tmp_path: Path) -> None:
    """Of torch no C++ function: their names and types change from one release to the next."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm, of binutils")
    library = zipfile.ZipFile(wheel).extract("hitsr_fast/_C.abi3.so", tmp_path)
    command = ["nm", "--dynamic", "--undefined-only", "--format=just-symbols", library]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    asked = [name.partition("@")[0] for name in symbols]
    assert "torch_parallel_for" in asked
    assert not [name for name in asked if name.startswith("_Z") and "std" not in name and "c10" in name]
    assert not [name for name in asked if name.startswith("GOMP_")]  # the threads are torch's


@pytest.fixture
def fresh() -> Iterator[None]:
    """What is known of the extension is forgotten, before and after."""

    def forget() -> None:
        extension.unavailable.cache_clear()
        extension.warn_once.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("fresh")
def test_that_the_extension_is_missing_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match=r"hitsr_fast\._C: not built \(pip install builds it") as told:
        extension.warn_once()
        extension.warn_once()
    assert len(told) == 1


@pytest.mark.usefixtures("fresh")
def test_another_torch_is_told_which_one_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> object:
        if name == "torch":
            return torch
        raise ImportError("undefined symbol: torch_parallel_for")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.warns(RuntimeWarning, match=r"does not load \(it needs torch 2\.10 or later, found .*symbol"):
        extension.warn_once()


def test_checkout_serves_its_own_kernels() -> None:
    import hitsr_fast.kernels.nearest_code

    assert Path(str(hitsr_fast.kernels.nearest_code.__file__)).parent == ROOT / "kernels" / "nearest_code"


def test_import_is_light() -> None:
    code = "import sys, hitsr_fast, hitsr_fast.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_without_python_headers_the_extension_is_left_out() -> None:
    """Debian has them in a package of its own, python3-dev."""
    code = """
import runpy, sys, sysconfig
get_path = sysconfig.get_path
sysconfig.get_path = lambda name, *rest: "/nowhere" if name == "include" else get_path(name, *rest)
sys.argv = ["setup.py", "--name"]
runpy.run_path("setup.py")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "no Python.h in /nowhere" in done.stdout
    assert done.stdout.splitlines()[-1] == "hitsr-fast"
