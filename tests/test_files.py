"""A file is whole as soon as it has its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from hitsr_fast.files import write_whole


def test_a_file_and_its_folder_are_made(tmp_path: Path) -> None:
    place = tmp_path / "new" / "deep" / "a.bin"
    for data in (b"first", b"second"):
        write_whole(place, data)
        assert place.read_bytes() == data
    assert list(place.parent.iterdir()) == [place]


def test_a_fault_leaves_what_was_there_and_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "a.bin"
    write_whole(place, b"first")

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(place, b"second")
    assert place.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [place]
