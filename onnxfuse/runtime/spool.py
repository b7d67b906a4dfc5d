"""Tensors of many batches that wait for their next use: in memory up to a limit, then in temporary files.

Files are read and written, not mapped: mapped pages would count as the process's memory, and the limit is
there so that memory doesn't grow with the number of samples.
"""

from __future__ import annotations

import os
import tempfile
from typing import BinaryIO

import numpy as np

from onnxfuse.errors import InputError


class Spool:
    """Arrays by (name, batch). A context manager: leaving it frees everything."""

    def __init__(self, limit: int) -> None:
        """
        Args:
            limit: bytes kept in memory.
        """
        self._limit = limit
        self._held = 0
        self._memory: dict[str, dict[int, np.ndarray]] = {}
        self._files: dict[str, BinaryIO] = {}
        self._places: dict[str, dict[int, tuple[int, np.dtype, tuple[int, ...]]]] = {}

    def put(self, name: str, batch: int, array: np.ndarray) -> None:
        """Keep an array.

        Args:
            name, batch: under which it is kept.
            array: the caller no longer changes it.

        Raises:
            InputError: the folder for temporary files is full.
        """
        if self._held + array.nbytes <= self._limit or array.dtype.hasobject:
            self._held += array.nbytes
            self._memory.setdefault(name, {})[batch] = array
            return
        try:
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            offset = file.seek(0, os.SEEK_END)
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            raise InputError(
                f"cannot keep intermediate tensors in {tempfile.gettempdir()}: {error.strerror or error}; "
                "free some space or set TMPDIR"
            ) from error
        self._places.setdefault(name, {})[batch] = (offset, array.dtype, array.shape)

    def get(self, name: str, batch: int) -> np.ndarray:
        """The array that was put.

        Raises:
            KeyError: none was.
        """
        found = self._memory.get(name, {}).get(batch)
        if found is not None:
            return found
        offset, dtype, shape = self._places[name][batch]
        array = np.empty(shape, dtype)
        file = self._files[name]
        file.seek(offset)
        data = array.reshape(-1).view(np.uint8).data
        while data:
            count = file.readinto(data)  # type: ignore[attr-defined]
            if not count:
                raise EOFError(f"temporary file of '{name}' ended early")
            data = data[count:]
        return array

    def drop(self, name: str) -> None:
        """Forget all batches of `name`."""
        self._held -= sum(array.nbytes for array in self._memory.pop(name, {}).values())
        self._places.pop(name, None)
        file = self._files.pop(name, None)
        if file is not None:
            file.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exception: object) -> None:
        for name in [*self._memory, *self._files]:
            self.drop(name)
