# SPDX-License-Identifier: Apache-2.0
"""An append-only array on disk, read through a memory map. The ledger beside it says how much of it counts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class ColumnTooShort(Exception):
    """A column holds fewer rows than the ledger promises: bytes that were synced are gone."""


class Column:
    """Rows of one dtype and shape in one flat file, native byte order."""

    def __init__(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], rows: int) -> None:
        """Open at `rows` rows, creating the file and cutting off what lies beyond. Raises ColumnTooShort."""
        self._dtype = np.dtype(dtype)
        self._shape = shape
        self._row_bytes = self._dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._path = path
        size = os.fstat(self._file).st_size
        if size < rows * self._row_bytes:
            os.close(self._file)
            raise ColumnTooShort(f"{path}: {size // self._row_bytes} rows on disk, the ledger counts {rows}")
        # A row beyond the ledger is the rest of an append that a crash interrupted.
        os.ftruncate(self._file, rows * self._row_bytes)
        self.rows = rows
        self.view: NDArray[Any] = self._map()

    def append(self, values: NDArray[Any]) -> None:
        """Write [N, *shape] at the end and sync it. It counts from the moment the ledger says so."""
        if values.shape[1:] != self._shape:
            raise ValueError(f"{self._path.name}: rows of shape {values.shape[1:]} instead of {self._shape}")
        data = memoryview(np.ascontiguousarray(values, dtype=self._dtype).tobytes())
        offset = self.rows * self._row_bytes
        while data:
            written = os.pwrite(self._file, data, offset)
            data, offset = data[written:], offset + written
        os.fdatasync(self._file)

    def advance(self, rows: int) -> None:
        """Count the first `rows` rows, after the ledger does."""
        if rows != self.rows:
            self.rows = rows
            self.view = self._map()

    def close(self) -> None:
        """Close the file; the last view stays readable."""
        os.close(self._file)

    def _map(self) -> NDArray[Any]:
        if self.rows == 0:
            return np.zeros((0, *self._shape), self._dtype)
        return np.memmap(self._path, dtype=self._dtype, mode="r", shape=(self.rows, *self._shape))
