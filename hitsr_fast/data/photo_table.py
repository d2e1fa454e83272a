"""Many photos in little memory: 56 bytes each beside their names, in arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int64]
_Bytes = npt.NDArray[np.uint8]


class Photo(NamedTuple):
    """A photo of a set.

    Args:
        name: In the set; its stem is that of the photo.
        file: That holds it, relative to the set's folder.
        offset: Of its first byte in the file; of a row of a data set its number.
        length: Of its bytes.
        digest: Of its head and tail, see `photo_of`; empty if it could not be read.
        width, height: As its head says; 0 if that cannot be read.
        fault: Why it cannot be read; empty if it can, as far as its head shows.
    """

    name: str
    file: str
    offset: int
    length: int
    digest: str
    width: int
    height: int
    fault: str


class Strings(Sequence[str]):
    """Strings in one array of bytes."""

    def __init__(self, blob: _Bytes, ends: _Ints) -> None:
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        """These strings, which need not be valid Unicode."""
        parts = [string.encode("utf-8", "surrogateescape") for string in strings]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return cls(np.frombuffer(b"".join(parts), np.uint8), np.cumsum(lengths))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        end = int(self.ends[index])
        begin = int(self.ends[index - 1]) if index % len(self) else 0
        return self.blob[begin:end].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        whole, begin = self.blob.tobytes(), 0
        for end in self.ends.tolist():
            yield whole[begin:end].decode("utf-8", "surrogateescape")
            begin = end

    def take(self, rows: _Ints) -> Strings:
        """Those of these rows."""
        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(self))):
            return self
        return Strings.of(self[int(row)] for row in rows)


class PhotoTable(Sequence[Photo]):
    """Photos as the columns of a table.

    Args:
        names, files: Of `Photo`.
        numbers: int64 `(N, 4)`: offset, length, width, height.
        digests: uint8 `(N, 16)`.
        faults: Of the photos that have one, by row.
    """

    def __init__(
        self, names: Strings, files: Strings, numbers: _Ints, digests: _Bytes, faults: dict[int, str]
    ) -> None:
        self.names, self.files, self.numbers, self.digests, self.faults = (
            names,
            files,
            numbers,
            digests,
            faults,
        )

    @classmethod
    def of(cls, photos: Sequence[Photo]) -> PhotoTable:
        """These photos."""
        if isinstance(photos, PhotoTable):
            return photos
        names = Strings.of(photo.name for photo in photos)
        # A folder's photos have the names of their files, and share them.
        shared = all(photo.name == photo.file for photo in photos)
        files = names if shared else Strings.of(photo.file for photo in photos)
        numbers = [(photo.offset, photo.length, photo.width, photo.height) for photo in photos]
        digests = b"".join(bytes.fromhex(photo.digest) if photo.digest else bytes(16) for photo in photos)
        return cls(
            names,
            files,
            np.array(numbers, np.int64).reshape(-1, 4),
            np.frombuffer(digests, np.uint8).reshape(-1, 16),
            {row: photo.fault for row, photo in enumerate(photos) if photo.fault},
        )

    @classmethod
    def join(cls, tables: Sequence[PhotoTable]) -> PhotoTable:
        """The photos of some tables, one after the other."""
        if len(tables) == 1:
            return tables[0]
        starts = np.cumsum([0, *(len(table) for table in tables)]).tolist()
        names = _joined([table.names for table in tables])
        shared = all(table.files is table.names for table in tables)
        return cls(
            names,
            names if shared else _joined([table.files for table in tables]),
            np.concatenate([np.empty((0, 4), np.int64), *(table.numbers for table in tables)]),
            np.concatenate([np.empty((0, 16), np.uint8), *(table.digests for table in tables)]),
            {
                start + row: fault
                for start, table in zip(starts, tables, strict=False)
                for row, fault in table.faults.items()
            },
        )

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Photo: ...

    @overload
    def __getitem__(self, index: slice) -> PhotoTable: ...

    def __getitem__(self, index: int | slice) -> Photo | PhotoTable:
        if isinstance(index, slice):
            return self.take(np.arange(len(self), dtype=np.int64)[index])
        row = range(len(self))[index]
        offset, length, width, height = self.numbers[row].tolist()
        digest = self.digests[row].tobytes()
        return Photo(
            self.names[row],
            self.files[row],
            offset,
            length,
            digest.hex() if any(digest) else "",
            width,
            height,
            self.faults.get(row, ""),
        )

    def take(self, rows: _Ints) -> PhotoTable:
        """The photos of these rows, in their order."""
        names = self.names.take(rows)
        files = names if self.files is self.names else self.files.take(rows)
        faults = {}
        if self.faults:
            faults = {new: self.faults[old] for new, old in enumerate(rows.tolist()) if old in self.faults}
        return PhotoTable(names, files, self.numbers[rows], self.digests[rows], faults)

    @property
    def shorter_sides(self) -> _Ints:
        """int64 `(N,)`: as the heads say."""
        sides: _Ints = self.numbers[:, 2:].min(axis=1)
        return sides

    @property
    def sound(self) -> npt.NDArray[np.bool_]:
        """bool `(N,)`: whether a photo has no fault."""
        sound = np.ones(len(self), np.bool_)
        sound[list(self.faults)] = False
        return sound


def _joined(columns: Sequence[Strings]) -> Strings:
    starts = np.cumsum([0, *(len(column.blob) for column in columns)])
    ends = [column.ends + start for column, start in zip(columns, starts, strict=False)]
    blobs = [column.blob for column in columns]
    return Strings(
        np.concatenate([np.empty(0, np.uint8), *blobs]), np.concatenate([np.empty(0, np.int64), *ends])
    )
