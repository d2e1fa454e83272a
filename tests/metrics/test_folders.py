from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

import pytest
from PIL import Image

from hitsr_fast.metrics import fid, kid
from hitsr_fast.metrics import folders as module
from hitsr_fast.metrics.registry import METRICS
from tests.metrics import pictures

# The package in small: what it was called with comes back as the value.
FAKE = """
DEFAULTS = {"samples_find_ext": "png,jpg", "kid_subset_size": 5}
calls = []
def calculate_metrics(**arguments):
    calls.append(arguments)
    keys = ("frechet_inception_distance", "kernel_inception_distance_mean")
    return {keys[0]: 12.5} if arguments.get("fid") else {keys[1]: 0.25, "kernel_inception_distance_std": 9.0}
"""


@pytest.fixture
def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    found = []
    for name, make in (("results", pictures.spoiled), ("truths", pictures.picture)):
        folder = tmp_path / name
        folder.mkdir()
        for index in range(3):
            Image.fromarray(make(index)[:64, :64]).save(folder / f"{index}.png")
        (folder / "notes.txt").touch()
        found.append(folder)
    return found[0], found[1]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    package = tmp_path / "site" / "torch_fidelity"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    (package / "defaults.py").write_text("from torch_fidelity import DEFAULTS\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(package.parent))
    yield importlib.import_module("torch_fidelity")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        del sys.modules[name]


def test_what_the_package_is_asked_for(two_folders: tuple[Path, Path], fake: object) -> None:
    results, truths = two_folders
    assert fid(results, truths, cuda=False, batch_size=7) == 12.5
    assert kid(results, truths, cuda=False) == 0.25
    both = {"input1": str(results), "input2": str(truths), "verbose": False, "cuda": False}
    first = {**both, "fid": True, "batch_size": 7}
    # Of the three pictures in a folder, where torch-fidelity's own choice is larger.
    second = {**both, "kid": True, "kid_subset_size": 3}
    assert fake.calls == [first, second]  # type: ignore[attr-defined]


def test_kid_keeps_the_packages_subsets_where_there_are_enough_pictures(
    two_folders: tuple[Path, Path], fake: object
) -> None:
    for folder in two_folders:
        for index in range(3, 6):
            (folder / f"{index}.png").write_bytes((folder / "0.png").read_bytes())
    kid(*two_folders, cuda=False)
    kid(*two_folders, cuda=False, kid_subset_size=2)
    assert [call["kid_subset_size"] for call in fake.calls] == [5, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["fid", "kid"])
def test_registry_measures_pictures_of_any_sizes(
    name: str, two_folders: tuple[Path, Path], fake: object
) -> None:
    assert METRICS[name].measure(*two_folders) == {"fid": 12.5, "kid": 0.25}[name]
    assert fake.calls[0]["batch_size"] == 1  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="truths: expected a folder of images to compare with, found None"):
        METRICS[name].measure(two_folders[0], None)


@pytest.mark.parametrize("measure", [fid, kid], ids=["fid", "kid"])
def test_a_missing_package_names_the_extra(
    measure: object, two_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert callable(measure)
    with pytest.raises(
        ImportError, match=r"torch-fidelity is not installed: pip install 'hitsr-fast\[fid\]'"
    ):
        measure(*two_folders)
    assert module.missing() is not None


@pytest.mark.parametrize("which", [0, 1])
def test_a_folder_without_pictures_is_named(
    which: int, two_folders: tuple[Path, Path], tmp_path: Path, fake: object
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    both = [empty if i == which else folder for i, folder in enumerate(two_folders)]
    with pytest.raises(
        ValueError, match=rf"{('results', 'truths')[which]}: expected a folder with .*{empty}"
    ):
        fid(*both)


def test_equals_torch_fidelity(two_folders: tuple[Path, Path]) -> None:
    """Its own call on the same folders, with a feature extractor that needs no weights."""
    fidelity = pytest.importorskip("torch_fidelity", reason="the extra fid is not installed")
    from tests.metrics.thumbnails import register

    name = register()
    results, truths = two_folders
    arguments = {"feature_extractor": name, "cuda": False, "batch_size": 2, "cache": False}
    direct = functools.partial(
        fidelity.calculate_metrics, input1=str(results), input2=str(truths), verbose=False, **arguments
    )
    assert fid(results, truths, **arguments) == direct(fid=True)["frechet_inception_distance"]
    expected = direct(kid=True, kid_subset_size=3)["kernel_inception_distance_mean"]
    assert kid(results, truths, **arguments) == expected
