"""`hitsr-fast crops`: what it says and the exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hitsr_fast.cli import main
from hitsr_fast.data.folder import photo_names
from tests.data.photos_of import write


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["crops", *words])
    return int(stop.value.code or 0)


def test_photos_become_sub_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "a.png", 1, 40, 40)
    source, target = str(tmp_path / "in"), str(tmp_path / "out")
    assert run(source, target, "--size", "32", "--step", "16", "--workers", "1") == 0
    assert photo_names(target) == [f"a_s{number:03}.png" for number in range(1, 5)]
    said = capsys.readouterr().out
    assert said == f"4 sub-images of 1 photos in {target}; 0 photos were done already\n"
    assert run(source, target, "--size", "32", "--step", "16") == 0
    assert capsys.readouterr().out.endswith("; 1 photos were done already\n")


def test_faults_are_a_line_each_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "a.png", 1)
    (tmp_path / "in" / "b.png").touch()
    assert run(str(tmp_path / "in"), str(tmp_path / "out")) == 2
    captured = capsys.readouterr()
    assert (
        captured.err == f"hitsr-fast crops: photo left out: {tmp_path / 'in' / 'b.png'}: the file is empty\n"
    )
    assert captured.out.startswith("1 sub-images of 1 photos")
    assert run(str(tmp_path / "nowhere"), str(tmp_path / "out")) == 2
    assert "nowhere" in capsys.readouterr().err
    assert run(str(tmp_path / "in"), str(tmp_path / "out"), "--step", "600") == 2
    assert "step: expected an integer from 1 to size = 512, found 600" in capsys.readouterr().err
    assert run(str(tmp_path / "in"), str(tmp_path / "in" / "a.png")) == 2
    assert "target: expected a folder apart from the photos'" in capsys.readouterr().err
    write(tmp_path / "file.png", 1)
    assert run(str(tmp_path / "in"), str(tmp_path / "file.png")) == 2
    assert "target: expected a folder, or none yet, found a file" in capsys.readouterr().err
