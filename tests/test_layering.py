"""The floors of the house: imports only go down, and nothing but env.py reads the environment."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hitsr_fast"

# A floor may import itself and what stands to the right of it here.
BELOW: dict[str, tuple[str, ...]] = {
    "reference": (),
    "_version": (),
    "checks": (),
    "configs": (),
    "files": (),
    "_lazy": (),
    "pyramid": ("checks",),
    "transfer": (),
    "env": (),
    "kernels": (),
    "extension": (),
    "precision": (),
    "backends": ("checks", "extension", "env", "precision"),
    "dispatch": ("backends", "checks", "extension", "env"),
    "ops": ("checks", "pyramid", "reference", "backends", "dispatch", "kernels", "env"),
    "imaging": ("checks", "env"),
    "data": ("_lazy", "checks", "configs", "files", "imaging", "transfer", "env"),
    "metrics": ("checks", "imaging", "env"),
    "losses": ("checks", "configs", "metrics", "transfer"),
    "nn": ("checks", "pyramid", "dispatch", "ops", "precision", "transfer"),
    "compat": ("checks", "pyramid", "nn", "ops", "precision"),
    "models": ("checks", "configs", "pyramid", "nn", "ops", "env"),
    "pipeline": ("checks", "models", "nn", "ops", "imaging", "env"),
    "evaluate": ("checks", "pipeline", "models", "metrics", "imaging", "data", "env"),
    "train": (
        *("_lazy", "checks", "configs", "models", "nn", "ops", "losses", "metrics", "data", "imaging"),
        *("pipeline", "env", "_version", "transfer", "pyramid", "precision"),
    ),
}
TOP = ("__init__", "cli")
SOURCES = sorted(PACKAGE.rglob("*.py"))


def floor(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_floors(path: Path) -> set[str]:
    """First component under hitsr_fast of every import in the file, those inside functions included."""
    floors = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "hitsr_fast" and len(parts) > 1:
                floors.add(parts[1])
    return floors


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    own = floor(path)
    if own in TOP:
        return
    assert own in BELOW, f"{own} has no floor: decide where it stands and add it to BELOW"
    assert imported_floors(path) - {own} <= set(BELOW[own])


def test_floors_have_an_order() -> None:
    """BELOW itself has no cycle."""
    done: set[str] = set()
    while len(done) < len(BELOW):
        ready = {name for name in BELOW if name not in done and set(BELOW[name]) <= done}
        assert ready, set(BELOW) - done
        done |= ready


def test_an_op_uses_its_own_backend_files() -> None:
    """The residual quantizer alone looks into others: it searches as one, and its gradient is another."""
    known = {
        ("nearest_code", "residual_quantize"),
        ("residual_decode_backward", "residual_quantize"),
        ("residual_quantize", "residual_decode_backward"),
    }
    for path in (PACKAGE / "ops").glob("*.py"):
        for other in (PACKAGE / "ops").glob("*_*.py"):
            op, backend = other.stem.rpartition("_")[::2]
            if backend in ("triton", "cuda", "schema") and not path.stem.startswith(op):
                uses = (
                    f"import {other.stem}" in path.read_text()
                    or f"ops.{other.stem} import" in path.read_text()
                )
                assert not uses or (op, path.stem.rpartition("_")[0]) in known


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_env_reads_the_environment(path: Path) -> None:
    if path != PACKAGE / "env.py":
        text = path.read_text()
        assert "os.environ" not in text
        assert "getenv" not in text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 600
    assert path.name != "utils.py"
