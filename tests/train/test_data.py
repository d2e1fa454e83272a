"""Data of a run: the same samples however they are made, and firm with files that are no photos."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hitsr_fast import env
from hitsr_fast.data.crops import NoPhotosError, PhotoCrops
from hitsr_fast.train.config import DataConfig
from hitsr_fast.train.data import Crops, IndexSampler, Loader, open_source
from hitsr_fast.train.prefetch import Workers
from tests.train.photos import write_photos

NAMES = ("a", "b", "c", "d", "held")


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HITSR_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", NAMES, 64)


def opened(path: Path, crop: int = 32, held_out: bool = False) -> PhotoCrops:
    source = open_source(path, holdout=("held",), crop=crop, held_out=held_out)
    assert isinstance(source, PhotoCrops)
    return source


def loader(
    source: PhotoCrops,
    *,
    batch: int = 8,
    micro: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    phase: str = "phase",
    seed: int = 0,
) -> Loader:
    sampler = IndexSampler(batch, micro, rank, world)
    return Loader(source, sampler, DataConfig(workers=workers), seed=seed, phase=phase, device="cpu")


def by_index(*loaders: Loader, steps: tuple[int, int] = (0, 3)) -> dict[int, Tensor]:
    """All crops that some loaders give, by their global index."""
    crops: dict[int, Tensor] = {}
    for each in loaders:
        for batches in each.steps(*steps):
            for batch in batches:
                assert batch.images.dtype == torch.uint8
                for index, image in zip(batch.index.tolist(), batch.images, strict=True):
                    assert index not in crops
                    crops[index] = image
    return crops


def same(a: dict[int, Tensor], b: dict[int, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[index], b[index]) for index in a)


@given(micro=st.integers(1, 4), shares=st.integers(1, 3), world=st.integers(1, 4), step=st.integers(0, 10**9))
def test_all_processes_together_take_each_sample_once(micro: int, shares: int, world: int, step: int) -> None:
    batch = micro * shares * world
    ranks = [IndexSampler(batch, micro, rank, world).micro_batches(step) for rank in range(world)]
    assert all(len(rank) == shares and {len(part) for part in rank} == {micro} for rank in ranks)
    taken = sorted(index for rank in ranks for part in rank for index in part)
    assert taken == list(range(step * batch, (step + 1) * batch))


def test_a_batch_that_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"batch: expected a multiple of the 3 processes, found 8"):
        IndexSampler(8, 0, 0, 3)
    with pytest.raises(ValueError, match=r"micro_batch: .*8 / 2 = 4, found 3"):
        IndexSampler(8, 3, 0, 2)


def test_samples_do_not_depend_on_processes_workers_and_micro_batches(folder: Path) -> None:
    source = opened(folder)
    whole = by_index(loader(source))
    assert sorted(whole) == list(range(24))
    for world in (2, 4):
        assert same(whole, by_index(*(loader(source, rank=rank, world=world) for rank in range(world))))
    assert same(whole, by_index(loader(source, micro=2)))
    for workers in (1, 2):
        assert same(whole, by_index(loader(source, micro=2, workers=workers)))
    two = [loader(opened(folder), micro=1, rank=rank, world=2, workers=1) for rank in range(2)]
    assert same(whole, by_index(*two))


def test_samples_are_those_of_the_keys(folder: Path) -> None:
    source = opened(folder)
    crops = by_index(loader(source, seed=3, phase="x"))
    assert all(
        torch.equal(crops[index], opened(folder).crop(3, "x", index, 32)) for index in reversed(range(24))
    )
    for other in (loader(source, seed=4, phase="x"), loader(source, seed=3, phase="y")):
        others = by_index(other)
        assert not any(torch.equal(others[index], crops[index]) for index in crops)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_can_be_the_first_and_nothing_is_made_for_those_before(folder: Path, workers: int) -> None:
    source = opened(folder)
    whole = by_index(loader(source), steps=(0, 4))
    late = by_index(loader(source, workers=workers), steps=(3, 4))
    assert same(late, {index: whole[index] for index in range(24, 32)})
    started = time.perf_counter()
    far = next(loader(source, workers=workers).steps(10**12, 10**12 + 5))
    assert far[0].index.tolist() == list(range(8 * 10**12, 8 * 10**12 + 8))
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize("workers", [0, 2])
def test_order_is_exact(folder: Path, workers: int) -> None:
    steps = list(loader(opened(folder), batch=4, micro=2, workers=workers).steps(5, 12))
    found = [batch.index.tolist() for batches in steps for batch in batches]
    assert found == [[index, index + 1] for index in range(20, 48, 2)]
    assert list(loader(opened(folder), workers=workers).steps(5, 5)) == []


def test_no_generator_moves(folder: Path) -> None:
    np_before, before = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[union-attr, index]
    by_index(loader(opened(folder), workers=1))
    assert torch.equal(before, torch.get_rng_state())
    assert (np_before == np.random.get_state()[1]).all()  # type: ignore[index]


def test_workers_end_with_the_steps(folder: Path) -> None:
    import multiprocessing

    steps = loader(opened(folder), workers=2).steps(0, 100)
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    steps.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_breaks_on_the_way_is_named_once_and_counted(
    folder: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:-600])
    (folder / "empty.jpg").touch()
    write_photos(folder, ("small",), 24)
    source = opened(folder)
    crops = by_index(loader(source, workers=workers))
    assert same(crops, by_index(loader(source, workers=workers, micro=4)))
    lines = capfd.readouterr().err.splitlines()
    for name, reason in (("b", "truncated"), ("empty", "the file is empty"), ("small", "24 x 24 is smaller")):
        (line,) = (line for line in lines if f"{name}." in line)
        assert line.startswith("hitsr-fast train: photo left out: ")
        assert reason in line
    assert len(lines) == len(loader(source).skipped) == 3
    (folder / "b.png").unlink()  # as if it had never been whole: the draws go on alike
    assert len(crops) == 24


def test_a_step_does_not_wait_for_its_data(folder: Path) -> None:
    """A step of 60 ms, whose crops take a worker some 10."""
    data = loader(opened(folder), workers=2)
    started = 0.0
    for step, _ in enumerate(data.steps(0, 25)):
        if step == 4:  # the workers are there and have decoded the photos
            assert data.waited > 0
            data.waited, started = 0.0, time.perf_counter()
        time.sleep(0.06)
    assert data.waited < 0.05 * (time.perf_counter() - started)


def test_nothing_can_be_decoded(folder: Path) -> None:
    for name in NAMES:
        (folder / f"{name}.png").write_bytes((folder / f"{name}.png").read_bytes()[:-600])
    for workers in (0, 1):
        with pytest.raises(NoPhotosError, match=r"found none among 4.*a\.png|found none among 4.*truncated"):
            by_index(loader(opened(folder), workers=workers))


def test_a_worker_that_dies_is_an_error(folder: Path) -> None:
    import multiprocessing

    steps = loader(opened(folder), workers=1).steps(0, 10**6)
    next(steps)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="data worker ended"):
        for _ in steps:
            pass


def test_a_worker_that_a_signal_ends_before_it_begins_is_started_again(folder: Path) -> None:
    import multiprocessing

    source = opened(folder)
    each = loader(source, workers=2)
    job = Crops(source, each.sampler, 0, "phase", 0, 3)
    workers = Workers(job, 2, 2, pinned=False, found={})
    for process in multiprocessing.active_children():
        process.kill()
    crops = torch.cat(list(workers))
    workers.close()
    whole = by_index(loader(source))
    assert torch.equal(crops, torch.stack([whole[index] for index in range(24)]))


class Faulty:
    """A source whose fault is in the program."""

    side, skipped, digest = 32, dict[str, str](), ""

    def crop(self, seed: int, phase: str, index: int, size: int) -> Tensor:
        raise ZeroDivisionError("planted")

    def newly_skipped(self) -> dict[str, str]:
        return {}


def test_an_error_in_a_worker_comes_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)in crop.*ZeroDivisionError: planted"):
        by_index(loader(Faulty(), workers=1))  # type: ignore[arg-type]


RUN = """
    import os, signal, sys, time
    from pathlib import Path
    from hitsr_fast.train.config import DataConfig
    from hitsr_fast.train.data import IndexSampler, Loader, open_source

    if __name__ == "__main__":
        source = open_source(Path(sys.argv[1]), holdout=("held",), crop=32, held_out=False)
        loader = Loader(source, IndexSampler(4, 0, 0, 1), DataConfig(), seed=0, phase="x", device="cpu")
        stop = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: stop.append(number))
        steps = loader.steps(0, 10**9)
        next(steps), next(steps)
        print("ready", flush=True)
        while set(stop) != {signal.SIGINT, signal.SIGTERM}:
            next(steps)
            time.sleep(0.01)
        for _ in range(20):
            next(steps)
        print("went on", flush=True)
"""


def test_signals_to_all_processes_leave_the_data_to_the_run(folder: Path, tmp_path: Path) -> None:
    """As Ctrl-C does in a terminal and torchrun with SIGTERM. And workers end with a run that just ends."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RUN))
    run = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(run.pid, number)
    out, err = run.communicate(timeout=60)
    assert (out, err, run.returncode) == ("went on\n", "", 0)
    assert _ended(run.pid)


def test_workers_end_when_the_run_is_killed(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RUN))
    run = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert run.stdout is not None
    run.stdout.readline()
    run.kill()
    run.wait()
    run.stdout.close()
    assert _ended(run.pid)


def _ended(group: int) -> bool:
    """Whether all processes of a group end within seconds."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_a_source_goes_to_workers_without_its_photos(folder: Path) -> None:
    source = opened(folder)
    source.crop(0, "x", 0, 32)
    assert len(pickle.dumps(source)) < 4000


def test_digest_follows_names_and_contents(folder: Path) -> None:
    digest = opened(folder).digest
    assert opened(folder).digest == digest
    data = bytearray((folder / "a.png").read_bytes())
    before = (folder / "a.png").stat()
    data[-20] ^= 1  # the same size
    (folder / "a.png").write_bytes(data)
    os.utime(folder / "a.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # and the same time
    changed = opened(folder).digest
    assert changed != digest
    data[-20] ^= 1
    (folder / "a.png").write_bytes(data)
    assert opened(folder).digest == digest
    (folder / "a.png").rename(folder / "e.png")
    assert opened(folder).digest not in (digest, changed)


def test_digest_is_of_the_photos_that_are_trained_on(folder: Path) -> None:
    digest, held = opened(folder).digest, opened(folder, held_out=True).digest
    write_photos(folder, ("zheld",), 64)
    (folder / "zheld.png").rename(folder / "held.png")
    assert opened(folder).digest == digest
    assert opened(folder, held_out=True).digest != held


def test_files_are_looked_into_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = opened(folder).digest
    monkeypatch.setattr("hitsr_fast.data.manifest.photo_of", None)
    assert opened(folder).digest == digest
    for place in (env.cache_dir() / "manifests").iterdir():
        place.write_text("{")
    with pytest.raises(TypeError):
        opened(folder)


def test_a_file_that_could_not_be_read_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("hitsr_fast.data.manifest.photo_of", failing)
        with pytest.raises(NoPhotosError, match="Input/output error"):
            opened(folder)
    assert len(opened(folder).photos) == 4


def test_first_run_on_ones_own_photos(folder: Path) -> None:
    train, held = (open_source(folder, holdout=None, crop=32, held_out=part) for part in (False, True))
    assert [photo.name for photo in held.photos] == ["a.png"]
    assert [photo.name for photo in train.photos] == ["b.png", "c.png", "d.png", "held.png"]


def test_a_broken_photo_is_not_the_one_held_out(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"")
    held = open_source(folder, holdout=None, crop=32, held_out=True)
    assert [photo.name for photo in held.photos] == ["b.png"]


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        opened(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoPhotosError, match="image files, found none"):
        opened(tmp_path / "empty")
    write_photos(tmp_path / "one", ("mine",), 64)
    with pytest.raises(NoPhotosError, match="at least two, one of which is held out"):
        open_source(tmp_path / "one", holdout=None, crop=32, held_out=False)
    with pytest.raises(NoPhotosError, match="at least 128 x 128"):
        opened(tmp_path / "one", crop=128)


def write_shards(folder: Path, shards: Path) -> Path:
    """The photos of a folder in shards of two, as WebDataset lays them out."""
    shards.mkdir()
    for number in range(0, len(NAMES), 2):
        with tarfile.open(shards / f"photos-{number // 2:03}.tar", "w") as shard:
            for name in NAMES[number : number + 2]:
                shard.add(folder / f"{name}.png", f"{name}.png")
                label = tarfile.TarInfo(f"{name}.cls")
                label.size = 1
                shard.addfile(label, io.BytesIO(b"7"))
    return shards


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    return write_shards(folder, tmp_path / "shards")


def test_shards_give_the_samples_of_their_photos(folder: Path, shards: Path) -> None:
    crops = by_index(loader(opened(folder)))
    for path in (shards, shards / "photos-{000..002}.tar"):
        assert same(by_index(loader(opened(path))), crops)
        assert same(by_index(loader(opened(path), workers=1)), crops)
    held = opened(shards, held_out=True)
    assert [photo.name for photo in held.photos] == ["photos-002.tar/held.png"]
    assert torch.equal(held.crop(0, "x", 0, 32), opened(folder, held_out=True).crop(0, "x", 0, 32))
    one = open_source(shards / "photos-000.tar", holdout=("b",), crop=32, held_out=False)
    assert [photo.name for photo in one.photos] == ["photos-000.tar/a.png"]


def test_images_beside_the_shards_of_a_folder_are_not_passed_over(folder: Path, shards: Path) -> None:
    (shards / "more").mkdir()
    shutil.copy(folder / "a.png", shards / "more" / "a.png")
    with pytest.raises(
        ValueError, match=r"images or \.tar files, found both in .*more/a\.png beside photos-000"
    ):
        opened(shards)
    assert len(opened(shards / "photos-{000..002}.tar").photos) == len(NAMES) - 1


def test_a_shard_that_is_not_there(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"photos-003\.tar"):
        opened(shards / "photos-{000..003}.tar")


@pytest.mark.parametrize(
    ("damage", "reason", "left"),
    [
        (lambda data: b"no tar" * 200, "not a whole uncompressed tar file", []),
        (lambda data: b"", "not a whole uncompressed tar file", []),
        (lambda data: data[: data.index(b"d.png") + 1024], "unexpected end of data", ["c.png"]),
        (lambda data: __import__("gzip").compress(data), "not a whole uncompressed tar file", []),
    ],
    ids=["junk", "empty", "cut", "compressed"],
)
def test_a_shard_that_cannot_be_read_is_named(
    shards: Path,
    damage: Callable[[bytes], bytes],
    reason: str,
    left: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = shards / "photos-001.tar"
    path.write_bytes(damage(path.read_bytes()))
    source = opened(shards)
    names = [photo.name for photo in source.photos]
    assert names == ["photos-000.tar/a.png", "photos-000.tar/b.png", *(f"photos-001.tar/{n}" for n in left)]
    loader(source)
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{path}: " in line
    assert reason in line


def test_a_changed_shard_changes_the_digest(shards: Path) -> None:
    digest = opened(shards).digest
    path = shards / "photos-001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 100] ^= 1
    path.write_bytes(data)
    assert opened(shards).digest != digest
