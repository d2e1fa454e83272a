"""Fetching photos out of packages, with packages made here: no network."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hitsr_fast.data import photos as photos_module
from hitsr_fast.data.debian_photos import PACKAGES, Package, Photo
from hitsr_fast.data.photos import PhotoFetchError, apt_download, fetch_package, largest_jpeg

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


def picture(width: int, height: int, kind: str = "JPEG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, kind)
    return buffer.getvalue()


class FakeArchive:
    """One package with a small PNG, a photo to halve and a theme file that holds two JPEGs."""

    def __init__(self, root: Path) -> None:
        content = root / "content"
        files = {
            "usr/share/a/small.png": picture(64, 48, "PNG"),
            "usr/share/a/large.jpg": picture(2001, 1500),
            "usr/share/a/theme.edj": b"junk\xff\xd8\xff"
            + picture(40, 30)
            + b"x" * 99
            + picture(80, 60, seed=1)
            + b"end",
            "DEBIAN/control": b"Package: fake\nVersion: 1.0\nArchitecture: all\n"
            b"Maintainer: a <a@b.c>\nDescription: d\n",
        }
        for name, data in files.items():
            (content / name).parent.mkdir(parents=True, exist_ok=True)
            (content / name).write_bytes(data)
        self.deb = root / "fake.deb"
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-Znone", "-b", str(content), str(self.deb)],
            check=True,
            capture_output=True,
        )
        self.package = Package(
            "fake",
            "1.0",
            hashlib.sha256(self.deb.read_bytes()).hexdigest(),
            1,
            tuple(
                Photo(f"usr/share/a/{file}", file.split(".")[0], "CC0-1.0")
                for file in ("small.png", "large.jpg", "theme.edj")
            ),
        )
        self.downloads = 0

    def download(self, package: Package, folder: Path) -> Path:
        self.downloads += 1
        return Path(shutil.copy(self.deb, folder))


@pytest.fixture
def archive(tmp_path: Path) -> FakeArchive:
    return FakeArchive(tmp_path)


@needs_dpkg
def test_fetch(archive: FakeArchive, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    assert fetch_package(archive.package, out, download=archive.download)
    names = ["fake__large.jpg", "fake__small.jpg", "fake__theme.jpg"]
    assert sorted(path.name for path in out.iterdir()) == [*names, "manifest.json"]
    sizes = {name: Image.open(out / name).size for name in names}
    assert sizes == {"fake__large.jpg": (1001, 750), "fake__small.jpg": (64, 48), "fake__theme.jpg": (80, 60)}
    entries = json.loads((out / "manifest.json").read_text())
    assert [entry["file"] for entry in entries] == names
    for entry in entries:
        assert entry["sha256"] == hashlib.sha256((out / entry["file"]).read_bytes()).hexdigest()
        assert (entry["width"], entry["height"]) == sizes[entry["file"]]
        assert entry["licence"] == "CC0-1.0"
        assert entry["source"] == "fake"
    assert entries[0]["source_size"] == [2001, 1500]
    original = np.asarray(Image.open(io.BytesIO(picture(64, 48, "PNG"))), np.float32)
    written = np.asarray(Image.open(out / "fake__small.jpg"), np.float32)
    assert np.abs(original - written).mean() < 4  # JPEG 95


@needs_dpkg
def test_what_is_there_and_right_is_not_fetched_again(archive: FakeArchive, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert fetch_package(archive.package, out, download=archive.download)
    assert not fetch_package(archive.package, out, download=archive.download)
    assert archive.downloads == 1
    before = (out / "fake__small.jpg").read_bytes()
    damages: list[Callable[[], object]] = [
        lambda: (out / "fake__small.jpg").unlink(),
        lambda: (out / "fake__small.jpg").write_bytes(before[:-9]),
        lambda: (out / "manifest.json").unlink(),
    ]
    for count, damage in enumerate(damages, start=2):
        damage()
        assert fetch_package(archive.package, out, download=archive.download)
        assert archive.downloads == count
        assert (out / "fake__small.jpg").read_bytes() == before


@needs_dpkg
def test_other_entries_of_the_manifest_stay(archive: FakeArchive, tmp_path: Path) -> None:
    own = {"file": "mine.jpg", "sha256": "0"}
    (tmp_path / "manifest.json").write_text(json.dumps([own]))
    fetch_package(archive.package, tmp_path, download=archive.download)
    assert own in json.loads((tmp_path / "manifest.json").read_text())


@needs_dpkg
def test_bad_checksum_names_the_package_and_writes_nothing(archive: FakeArchive, tmp_path: Path) -> None:
    with archive.deb.open("ab") as file:
        file.write(b"!")
    out = tmp_path / "out"
    with pytest.raises(PhotoFetchError, match=r"fake 1\.0: expected SHA256"):
        fetch_package(archive.package, out, download=archive.download)
    assert list(out.iterdir()) == []


@needs_dpkg
def test_a_photo_that_is_not_inside(archive: FakeArchive, tmp_path: Path) -> None:
    package = Package("fake", "1.0", archive.package.sha256, 1, (Photo("usr/gone.jpg", "gone", ""),))
    with pytest.raises(PhotoFetchError, match=r"usr/gone\.jpg"):
        fetch_package(package, tmp_path / "out", download=archive.download)


@needs_dpkg
def test_an_interrupted_write_leaves_no_half_file(
    archive: FakeArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        fetch_package(archive.package, tmp_path / "out", download=archive.download)
    assert list((tmp_path / "out").iterdir()) == []


def test_foreign_manifest_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"something": "else"}')
    with pytest.raises(PhotoFetchError, match=r"manifest\.json"):
        fetch_package(PACKAGES[0], tmp_path)
    assert (tmp_path / "manifest.json").read_text() == '{"something": "else"}'


def test_no_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos_module.shutil, "which", lambda tool: None)
    with pytest.raises(PhotoFetchError, match="apt-get not found"):
        fetch_package(PACKAGES[0], tmp_path)


def stub_apt(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_apt_is_asked_for_the_pinned_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_apt(tmp_path / "bin", 'echo "$@" > asked.deb', monkeypatch)
    for package, asked in (
        (PACKAGES[0], "enlightenment-data=0.25.4-2"),
        (PACKAGES[7], "budgie-core:amd64=10.7.1-1"),
    ):
        folder = tmp_path / package.name
        folder.mkdir()
        assert apt_download(package, folder).read_text() == f"download {asked}\n"


def test_apt_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_apt(tmp_path / "bin", "echo 'E: no such version' >&2; exit 100", monkeypatch)
    with pytest.raises(
        PhotoFetchError, match=r"enlightenment-data 0\.25\.4-2: .*no such version.*apt-get update"
    ):
        apt_download(PACKAGES[0], tmp_path)


def test_largest_jpeg() -> None:
    small, large = picture(40, 30), picture(60, 50, seed=1)
    for data in (small + large, large + small, b"\xff\xd8\xff" + small + large):
        assert Image.open(io.BytesIO(largest_jpeg(data))).size == (60, 50)
    with pytest.raises(ValueError, match="JPEG"):
        largest_jpeg(b"nothing \xff\xd8\xff here")


def test_the_catalogue_is_consistent() -> None:
    names = [f"{package.name}__{photo.name}" for package in PACKAGES for photo in package.photos]
    assert len(names) == len(set(names)) == 70
    for package in PACKAGES:
        assert len(package.sha256) == 64
        assert all(photo.licence and not photo.path.startswith("/") for photo in package.photos)
