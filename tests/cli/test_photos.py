"""`hitsr-fast photos`: what it says and the exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tyro

from hitsr_fast.cli.photos import Photos
from hitsr_fast.data import photos as photos_module
from hitsr_fast.data.debian_photos import PACKAGES, Package
from hitsr_fast.data.photos import PhotoFetchError


def test_arguments(tmp_path: Path) -> None:
    command = tyro.cli(Photos, args=[str(tmp_path), "--packages", "budgie-core", "palapeli-data"])
    assert command == Photos(tmp_path, ("budgie-core", "palapeli-data"))
    assert tyro.cli(Photos, args=[str(tmp_path)]).packages == ()


def test_all_packages_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def fetch(package: Package, folder: Path) -> bool:
        asked.append(package.name)
        return package.name != "budgie-core"

    monkeypatch.setattr(photos_module, "fetch_package", fetch)
    assert Photos(tmp_path).run() == 0
    assert asked == [package.name for package in PACKAGES]
    out = capsys.readouterr().out
    assert "budgie-core (3 MB): there already" in out
    assert "enlightenment-data (401 MB): 14 photos" in out


def test_unknown_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Photos(tmp_path, ("cat-pictures",)).run() == 2
    error = capsys.readouterr().err
    assert "cat-pictures" in error
    assert "budgie-core" in error


def test_failure_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(package: Package, folder: Path) -> bool:
        raise PhotoFetchError(f"{package.name}: no")

    monkeypatch.setattr(photos_module, "fetch_package", fetch)
    assert Photos(tmp_path, ("palapeli-data",)).run() == 2
    assert capsys.readouterr().err == "hitsr-fast photos: palapeli-data: no\n"
