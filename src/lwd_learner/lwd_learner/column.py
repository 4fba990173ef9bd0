# SPDX-License-Identifier: Apache-2.0
"""An array on disk in segments: files of one fixed size, read through memory maps that never have to be made anew.

The ledger beside it says how many rows count; what lies beyond is the rest of an append that a crash interrupted, and
is written over. One process writes; any number read what counts meanwhile.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lwd_fleet.data.files import sync_directory
from lwd_learner.ledger import REMEDY


class ColumnTooShort(Exception):
    """A segment is gone or cut off, though the ledger counts on it: bytes that were synced are lost."""


class Column:
    """Rows of one dtype and shape, native byte order, in `<path>.00000`, `<path>.00001`, ... No row lies in two
    segments. Segments are sparse: one takes the space of what was written to it."""

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], segment_bytes: int) -> None:
        self._path = path
        self._dtype = np.dtype(dtype)
        self._shape = shape
        self._row_bytes = self._dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        self.segment_rows = max(1, segment_bytes // self._row_bytes)
        self._maps: dict[int, NDArray[np.uint8]] = {}  # [segment_rows, row_bytes], of the segments looked at
        self._dirty: dict[int, int] = {}  # segment -> descriptor, of what was written since the last sync
        # Whether names of segments may not be durable yet. Also at first: who made them may have been killed before.
        self._unsynced_names = True

    def require(self, first: int, rows: int) -> None:
        """Raises ColumnTooShort unless every segment with one of the rows `first` .. `rows - 1` is whole."""
        for number in range(first // self.segment_rows, -(-rows // self.segment_rows)):
            self._require_segment(number)

    def _require_segment(self, number: int) -> None:
        file = self._file(number)
        size = file.stat().st_size if file.exists() else 0
        if size != self._segment_bytes:
            raise ColumnTooShort(
                f"{file.parent}: {file.name} has {size} of {self._segment_bytes} bytes, though the ledger counts on them;"
                f" {REMEDY}"
            )

    def gather(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """[...] -> [..., *shape], a copy."""
        flat = rows.reshape(-1)
        taken = np.empty((len(flat), self._row_bytes), np.uint8)
        segment, local = np.divmod(flat, self.segment_rows)
        touched = np.unique(segment).tolist()
        for number in touched:
            if len(touched) == 1:
                # `clip` writes straight into `taken`; the default would go through a buffer.
                np.take(self._segment(number), local, axis=0, out=taken, mode="clip")
            else:
                here = np.flatnonzero(segment == number)
                taken[here] = self._segment(number)[local[here]]
        return taken.view(self._dtype).reshape(*rows.shape, *self._shape)

    def read(self, first: int, count: int) -> NDArray[Any]:
        """Rows `first` .. `first + count - 1`, [count, *shape]; not copied where they lie in one segment."""
        parts = []
        at, end = first, first + count
        while at < end:
            number, local = divmod(at, self.segment_rows)
            taken = min(end - at, self.segment_rows - local)
            parts.append(self._segment(number)[local : local + taken])
            at += taken
        if not parts:
            return np.zeros((0, *self._shape), self._dtype)
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return rows.reshape(-1).view(self._dtype).reshape(count, *self._shape)

    def write(self, first: int, values: NDArray[Any]) -> None:
        """Put [N, *shape] at rows `first` .. They count from the moment the ledger says so, after `sync`."""
        if values.shape[1:] != self._shape:
            raise ValueError(f"{self._path.name}: rows of shape {values.shape[1:]} instead of {self._shape}")
        data = memoryview(np.ascontiguousarray(values, dtype=self._dtype).tobytes())
        at = first
        while data:
            number, local = divmod(at, self.segment_rows)
            rows = min(len(data) // self._row_bytes, self.segment_rows - local)
            piece, data = data[: rows * self._row_bytes], data[rows * self._row_bytes :]
            offset = local * self._row_bytes
            while piece:
                written = os.pwrite(self._writable(number), piece, offset)
                piece, offset = piece[written:], offset + written
            at += rows

    def sync(self) -> None:
        """Make what was written durable."""
        for descriptor in self._dirty.values():
            os.fdatasync(descriptor)
        self.close()
        if self._unsynced_names:
            sync_directory(self._path.parent)
            self._unsynced_names = False

    def close(self) -> None:
        """Forget what was written and not synced. What was read stays readable."""
        for descriptor in self._dirty.values():
            os.close(descriptor)
        self._dirty.clear()

    @property
    def _segment_bytes(self) -> int:
        return self.segment_rows * self._row_bytes

    def _file(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number:05d}")

    def _segment(self, number: int) -> NDArray[np.uint8]:
        if number not in self._maps:
            self._require_segment(number)  # it may have gone since the column was opened
            with open(self._file(number), "rb") as file:
                mapped = mmap.mmap(file.fileno(), self._segment_bytes, prot=mmap.PROT_READ)
            mapped.madvise(
                mmap.MADV_RANDOM
            )  # rows are drawn at random: reading ahead would only fill the cache
            self._maps[number] = np.frombuffer(mapped, np.uint8).reshape(self.segment_rows, self._row_bytes)
        return self._maps[number]

    def _writable(self, number: int) -> int:
        if number not in self._dirty:
            descriptor = os.open(self._file(number), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._dirty[number] = descriptor
            if os.fstat(descriptor).st_size != self._segment_bytes:
                os.ftruncate(descriptor, self._segment_bytes)
                self._unsynced_names = True
        return self._dirty[number]
