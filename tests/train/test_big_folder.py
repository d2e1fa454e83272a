"""Folders of many photos: what is read of them at the start, and what a run on them takes."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from hitsr_fast.data.source_config import SourceConfig
from hitsr_fast.data.sources import Sources, open_sources
from hitsr_fast.train.config import DataConfig
from hitsr_fast.train.data import IndexSampler, Loader, memory_of
from tests.train.big_folder import train, write_folder
from tests.train.photos import write_photos


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path / "cache"))


def bytes_read() -> int:
    """By this process, from files and all else."""
    return int(Path("/proc/self/io").read_text().split()[1])


def private_memory(process: int) -> int:
    """Bytes that no other process shares."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def test_a_process_holds_its_part_of_the_memory() -> None:
    assert memory_of(DataConfig(workers=3, memory_mib=100)) == 25 << 20
    assert memory_of(DataConfig(workers=0, memory_mib=100)) == 100 << 20


@pytest.mark.parametrize("listed", [False, True])
def test_what_is_held_out_shares_the_memory_of_what_is_trained_on(tmp_path: Path, listed: bool) -> None:
    write_photos(tmp_path, tuple("abcdef"), 40)
    photo, configs = 40 * 40 * 3, [SourceConfig(), SourceConfig(name="again")] if listed else []
    parts = open_sources(tmp_path, configs, holdout=("a", "b", "c"), crop=16, memory=3 * photo)
    for index in range(40):
        for source in parts:
            source.crop(0, "x", index, 16)
    crops = [each for part in parts for each in (part.crops if isinstance(part, Sources) else [part])]
    assert len(crops) == (4 if listed else 2)
    assert sum({id(each.decoded): each.decoded.held for each in crops}.values()) == 3 * photo


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs Linux's /proc")
def test_neither_the_start_nor_the_memory_follows_the_bytes_of_a_folder(tmp_path: Path) -> None:
    """200 photos of one megapixel: 600 MB decoded."""
    names, side = 200, 1000
    folder = write_folder(tmp_path / "photos", names, 4, side, side)
    whole = sum(path.stat().st_size for path in folder.iterdir())
    before = bytes_read()
    config = DataConfig(workers=2, memory_mib=24)
    source, _held = open_sources(folder, holdout=None, crop=64, memory=memory_of(config))
    read = bytes_read() - before
    assert names * 2 * 16384 <= read < names * (2 * 16384 + 8192) + 1_000_000
    assert read < 0.2 * whole
    before = bytes_read()
    open_sources(folder, holdout=None, crop=64)
    assert bytes_read() - before < 200_000  # what is known is kept
    loader = Loader(source, IndexSampler(16, 0, 0, 1), config, seed=0, phase="x", device="cpu")
    steps = loader.steps(0, 100)
    started, late = [], []
    for step in range(12):
        next(steps)
        if step in (3, 11):
            memory = [private_memory(process.pid) for process in multiprocessing.active_children()]  # type: ignore[arg-type]
            (late if step == 11 else started).append(sum(memory))
    steps.close()
    # 128 further crops, of 3 MB each decoded, in two processes that hold 8 MiB each.
    assert late[0] - started[0] < 40e6


RUN = (
    "--autoencode.schedule.steps 0 --next-scale.schedule.steps 0 --decode.schedule.steps 0 "
    "--tokenize.schedule.steps 12 --tokenize.task.codebook-images 0 --task.loss.alex 0 --task.loss.vgg 0 "
    "--log.mfu false --log.every 1 --data.workers 2"
)


@pytest.mark.slow
def test_ten_thousand_photos(tmp_path: Path) -> None:
    """Of two megapixels, 200 of them different: under 2 GB a rank, the first step within 10 s, no wait."""
    folder = write_folder(tmp_path / "photos", 10_000, 200, 1224, 1632)
    for name in ("first", "second"):  # the second finds its manifest
        run = train(folder, tmp_path / name, RUN.split())
        print(
            f"{name}: {run.memory / 1e9:.2f} GB of {[size // 10**6 for _, size in run.parts]} MB, "
            f"first step after {run.first:.1f} s, steps of {sum(run.seconds) / len(run.seconds):.2f} s, "
            f"longest wait {max(run.waits):.1%}"
        )
        assert run.memory < 2e9
        assert run.first < 10
        assert max(run.waits) < 0.05
