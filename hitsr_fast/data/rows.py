"""Photos of a data set of Hugging Face's package `datasets`, read by the numbers of their rows."""

from __future__ import annotations

import importlib
import io
import os
import re
from pathlib import Path
from typing import Any

from hitsr_fast.data.manifest import kept_table, photo_of
from hitsr_fast.data.photo_table import Photo, PhotoTable
from hitsr_fast.imaging.io import ImageFileError

PREFIX = "hf:"
_PATTERN = re.compile(r"hf:(?P<name>[^:]+)(:(?P<split>[^:\[]+(\[[^\]]*\])?))?(:(?P<column>.+))?")
_AT_ONCE = 4096


class RowReader:
    """Reads photos of a column of images; each process opens the data set for itself.

    Args:
        path: `hf:NAME[:SPLIT[:COLUMN]]`. NAME is a folder that `save_to_disk` wrote (whose split counts only
            if it has several), else what `load_dataset` takes; the split `train` and the column `image` are
            the defaults.
        root: What a folder is relative to.

    Raises:
        ValueError: The path has another form, or there is no such column, or no such split in a folder.
        ModuleNotFoundError: The package `datasets` is not installed; the message names the extra.
    """

    def __init__(self, path: str, root: Path) -> None:
        parts = _PATTERN.fullmatch(path)
        if parts is None:
            raise ValueError(f"path: expected hf:NAME[:SPLIT[:COLUMN]], found {path!r}")
        self.path, self.root = path, root
        self.split, self.column = parts["split"] or "train", parts["column"] or "image"
        self._name = parts["name"]
        self._opened: Any = None
        self._rows()  # an error is of this process

    def photos(self, limit: int, cache: Path | None) -> PhotoTable:
        """The images of all rows, or of the first `limit`; read once, kept by the data set's fingerprint."""
        rows = self._rows()
        count = min(limit, len(rows)) if limit else len(rows)
        fingerprint = getattr(rows, "_fingerprint", "")
        key = f"{self.column}\n{fingerprint}\n{count}" if fingerprint else ""
        return kept_table(cache, key, lambda: self._scanned(count))

    def read(self, photo: Photo) -> bytes:
        return self._row(photo.offset)[0]

    def place(self, photo: Photo) -> str:
        return f"{self.path}/{photo.name}"

    @property
    def name(self) -> str:
        return self.path

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}

    def _scanned(self, count: int) -> PhotoTable:
        tables = []
        for first in range(0, count, _AT_ONCE):
            photos = [self._photo(number) for number in range(first, min(first + _AT_ONCE, count))]
            tables.append(PhotoTable.of(photos))
        return PhotoTable.join(tables)

    def _photo(self, number: int) -> Photo:
        try:
            data, file = self._row(number)
        except ImageFileError as error:
            return Photo(f"{number:08}", "", number, 0, "", 0, 0, error.reason)
        name = f"{number:08}/{os.path.basename(file)}" if file else f"{number:08}"
        found = photo_of(name, "", 0, len(data), io.BytesIO(data))
        return found._replace(offset=number)

    def _row(self, number: int) -> tuple[bytes, str]:
        """The bytes of a row's image, and the path that it has, if any."""
        image = self._rows()[number][self.column] or {}
        data, file = image.get("bytes"), image.get("path") or ""
        if data is None and file:
            try:
                data = Path(file).read_bytes()
            except OSError as error:
                raise ImageFileError(file, error.strerror or str(error)) from error
        if data is None:
            raise ImageFileError(f"{self.path}/{number:08}", "the row has no image")
        return bytes(data), file

    def _rows(self) -> Any:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> Any:
        try:
            datasets: Any = importlib.import_module("datasets")
        except ModuleNotFoundError as error:
            if error.name != "datasets":
                raise
            needs = 'it needs the package datasets: pip install "hitsr-fast[hf]"'
            raise ModuleNotFoundError(f"{self.path}: {needs}", name="datasets") from error
        folder = self.root / self._name
        if (folder / "state.json").is_file():
            rows = datasets.load_from_disk(str(folder))
        elif (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(folder))
            if self.split not in splits:
                raise ValueError(
                    f"{self.path}: expected one of the splits {list(splits)}, found {self.split!r}"
                )
            rows = splits[self.split]
        else:
            rows = datasets.load_dataset(str(folder) if folder.exists() else self._name, split=self.split)
        if self.column not in rows.column_names:
            raise ValueError(
                f"{self.path}: expected one of the columns {rows.column_names}, found {self.column!r}"
            )
        return rows.cast_column(self.column, datasets.Image(decode=False))
