"""The documents name what there is: files of the repository, and names of the package that import."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

from hitsr_fast import extension

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("hitsr_fast/weights/*/*.md")})
FOLDERS = "hitsr_fast|csrc|kernels|tests|docs|benchmarks|examples"
PACKAGES = "|".join(path.name for path in (ROOT / "hitsr_fast").iterdir() if path.is_dir())
EXAMPLE = ("scaled_tanh", "<")  # what CONTRIBUTING.md shows how to add, and a name to be filled in
OF_VAR = {"models/vqvae.py"}

pytestmark = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_files_are_there(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./*<>-]+", text))
    named |= set(re.findall(rf"`((?:{PACKAGES})/[\w./*-]+\.py)`", text)) - OF_VAR
    named = {name.rstrip(".") for name in named if not any(word in name for word in EXAMPLE)}
    assert not [name for name in named if not any(any(top.glob(name)) for top in (ROOT, ROOT / "hitsr_fast"))]


def test_names_import(page: Path) -> None:
    text = page.read_text()
    names = set(re.findall(r"(?<![\w./:-])hitsr_fast(?:\.\w*[A-Za-z]\w*)+", text))
    for module, imported in re.findall(r"from (hitsr_fast[\w.]*) import ([\w, ]+)", text):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    names -= {f"hitsr_fast.{module}" for module in extension.MODULES}  # which need not be built
    assert not [name for name in names if not imports(name)]


def imports(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True
