"""Bytes of a set's photos, wherever they lie, read at random."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from hitsr_fast.data.photo_table import Photo
from hitsr_fast.imaging.io import ImageFileError


class Reader(Protocol):
    """Reads the photos of a set; goes to workers by pickle."""

    def read(self, photo: Photo) -> bytes:
        """The photo's file; raises `ImageFileError` where it cannot be read."""

    def place(self, photo: Photo) -> str:
        """How messages name the photo."""

    @property
    def name(self) -> str:
        """How messages name the set."""


class FileReader:
    """Reads photos of a folder: files, or parts of files.

    Args:
        folder: What the photos' files are relative to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def read(self, photo: Photo) -> bytes:
        path = self.folder / photo.file
        try:
            with path.open("rb") as file:
                file.seek(photo.offset)
                return file.read(photo.length)
        except OSError as error:
            raise ImageFileError(path, error.strerror or str(error)) from error

    def place(self, photo: Photo) -> str:
        return str(self.folder / photo.name)

    @property
    def name(self) -> str:
        return str(self.folder)
