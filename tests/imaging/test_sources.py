"""Files, folders and patterns become jobs; what is wrong is said once and stops nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hitsr_fast.imaging.sources import Job, find_jobs


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for name in (
        "b.jpg",
        "a.PNG",
        "deep/er/c.tif",
        ".hidden.png",
        ".git/d.png",
        "__MACOSX/e.png",
        "Thumbs.db",
        "f.txt",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def targets(jobs: list[Job], below: Path) -> list[str]:
    return [os.path.relpath(path, below) for job in jobs for path in job.targets.values()]


def test_a_folder_keeps_its_tree_and_leaves_junk_out(photos: Path, tmp_path: Path) -> None:
    jobs, errors = find_jobs([str(photos)], tmp_path / "out", (1, 4), "webp")
    assert not errors
    assert targets(jobs, tmp_path / "out") == [
        "a_x1.webp", "a_x4.webp", "b_x1.webp", "b_x4.webp", "deep/er/c_x1.webp", "deep/er/c_x4.webp",
    ]  # fmt: skip


def test_named_files_are_flat_whatever_their_name(photos: Path, tmp_path: Path) -> None:
    jobs, errors = find_jobs([str(photos / "deep/er/c.tif"), str(photos / "f.txt")], tmp_path, (2,), "png")
    assert targets(jobs, tmp_path) == ["c_x2.png", "f_x2.png"] and not errors


def test_patterns(photos: Path, tmp_path: Path) -> None:
    jobs, errors = find_jobs(
        [str(photos / "**" / "[bc].*"), str(photos / "*.bmp")], tmp_path / "o", (2,), "png"
    )
    assert targets(jobs, tmp_path / "o") == ["b_x2.png", "c_x2.png"]
    assert [error.reason for error in errors] == ["no file matches this pattern"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].png").write_bytes(b"")
    jobs, errors = find_jobs([str(tmp_path / "a[1].png")], tmp_path / "o", (2,), "png")
    assert len(jobs) == 1 and not errors


def test_an_image_is_done_once(photos: Path, tmp_path: Path) -> None:
    jobs, errors = find_jobs(
        [str(photos / "b.jpg"), str(photos), str(photos / "b.jpg")], tmp_path / "o", (2,), "png"
    )
    assert [job.source.name for job in jobs] == ["b.jpg", "a.PNG", "c.tif"] and not errors


def test_equal_names_are_an_error_for_the_later_one(photos: Path, tmp_path: Path) -> None:
    (photos / "a.jpg").write_bytes(b"")
    jobs, errors = find_jobs([str(photos)], tmp_path / "o", (2,), "png")
    assert [job.source.name for job in jobs] == ["a.PNG", "b.jpg", "c.tif"]
    assert len(errors) == 1
    assert (
        str(errors[0])
        == f"{photos / 'a.jpg'}: its outputs would have the same names as those of {photos / 'a.PNG'}"
    )


def test_outputs_inside_the_input_folder_are_not_inputs(photos: Path) -> None:
    inside = photos / "out"
    for _ in range(2):
        jobs, errors = find_jobs([str(photos)], inside, (4,), "png")
        assert [job.source.name for job in jobs] == ["a.PNG", "b.jpg", "c.tif"] and not errors
        for job in jobs:
            job.targets[4].parent.mkdir(parents=True, exist_ok=True)
            job.targets[4].write_bytes(b"")
    for _ in range(2):
        jobs, errors = find_jobs([str(photos)], photos, (4,), "png")
        kept = [job for job in jobs if "out" not in job.source.parts]
        assert [job.source.name for job in kept] == ["a.PNG", "b.jpg", "c.tif"] and not errors
        for job in jobs:
            job.targets[4].write_bytes(b"")


def test_outputs_of_other_scales_and_formats_are_not_inputs(tmp_path: Path) -> None:
    for name in ("cat.png", "cat_x1.png", "cat_x2.webp", "dog_x2.png"):
        (tmp_path / name).write_bytes(b"")
    jobs, errors = find_jobs([str(tmp_path)], tmp_path, (4,), "png")
    assert [job.source.name for job in jobs] == ["cat.png", "dog_x2.png"] and not errors
    elsewhere, _ = find_jobs([str(tmp_path)], tmp_path / "o", (4,), "png")
    assert len(elsewhere) == 4  # where no output goes they are images like others


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    for name in ("cat.png", "cat_x4.png"):
        (tmp_path / name).write_bytes(b"")
    jobs, errors = find_jobs([str(tmp_path / "cat.png"), str(tmp_path / "cat_x4.png")], tmp_path, (4,), "png")
    assert [job.source.name for job in jobs] == ["cat_x4.png"]
    assert "would replace an input" in str(errors[0])


def test_photos_that_cannot_be_read_are_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "phone.HEIC").write_bytes(b"")
    jobs, errors = find_jobs([str(tmp_path)], tmp_path / "o", (4,), "png")
    assert [job.source.name for job in jobs] == ["phone.HEIC"] and not errors


def test_a_folder_without_images(tmp_path: Path) -> None:
    jobs, errors = find_jobs([str(tmp_path)], tmp_path / "o", (4,), "png")
    assert not jobs and [error.reason for error in errors] == ["no images in this folder"]


def test_loops_of_links_and_long_names_stop_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    jobs, errors = find_jobs([str(tmp_path), "x" * 300], tmp_path / "o", (4,), "png")
    assert len(jobs) >= 2 and not errors  # reading them says what is wrong


def test_no_name_is_not_the_current_folder(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    jobs, errors = find_jobs([""], Path("o"), (4,), "png")
    assert not jobs and [str(error) for error in errors] == ["'': is no name of a file or folder"]


def test_a_folder_that_cannot_be_read_is_named(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def closed(path: str) -> object:
        if str(path).endswith("er"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    jobs, errors = find_jobs([str(photos)], photos / "o", (4,), "png")
    assert [job.source.name for job in jobs] == ["a.PNG", "b.jpg"]
    assert [str(error) for error in errors] == [f"{photos / 'deep/er'}: cannot be read: Permission denied"]
