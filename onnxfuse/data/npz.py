"""Arrays that lie in `.npy` and `.npz` files, read row by row.

NumPy maps a `.npy` but loads a member of an `.npz` whole. A member is itself a `.npy` in a zip stream,
though: its header says type, shape and order, and in C order its rows follow one another. So both kinds are
read alike, through a file positioned at the rows that are wanted, and memory does not depend on how many
there are.
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from onnxfuse.errors import InputError

_READ_ERRORS = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class StoredArray:
    """An array that lies in a file (`open` starts at its .npy header) or in memory (`array`)."""

    where: str
    dtype: np.dtype
    shape: tuple[int, ...]
    open: Callable[[], BinaryIO] | None = None
    array: np.ndarray | None = None
    c_order: bool = True

    def load(self) -> np.ndarray:
        """The whole array. Raises InputError where the file cannot be read."""
        if self.array is not None:
            return self.array
        assert self.open is not None
        with reading(self.where), self.open() as file:
            return np.lib.format.read_array(file, allow_pickle=False)


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Report what goes wrong while a file is read as an InputError that names it."""
    try:
        yield
    except _READ_ERRORS as error:
        said = " ".join(str(error).split())
        raise InputError(f"cannot read {where}: {said or type(error).__name__}") from error


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of the .npy file that starts here; leaves the file at its data."""
    version = np.lib.format.read_magic(file)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in reader:
        raise ValueError(f".npy format {version[0]}.{version[1]} is not supported")
    shape, fortran, dtype = reader[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects; save it with a numeric type")
    return shape, fortran, dtype


def _stored(where: str, opener: Callable[[], BinaryIO]) -> StoredArray:
    with reading(where), opener() as file:
        shape, fortran, dtype = _header(file)
    return StoredArray(where, dtype, shape, open=opener, c_order=not fortran or len(shape) < 2)


def npz_arrays(path: Path) -> dict[str, StoredArray]:
    """The arrays of an `.npz` by name. Raises InputError where it cannot be read."""
    with reading(f"'{path}'"), zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]

    def opener(member: str) -> Callable[[], BinaryIO]:
        def open_member() -> BinaryIO:
            with zipfile.ZipFile(path) as archive:  # the open member keeps the file open
                return archive.open(member)  # type: ignore[return-value]

        return open_member

    names = {member.removesuffix(".npy"): member for member in members}
    return {name: _stored(f"'{path}' array '{name}'", opener(member)) for name, member in names.items()}


def npy_array(path: Path) -> StoredArray:
    """The array of an `.npy`. Raises InputError where it cannot be read."""
    return _stored(f"'{path}'", lambda: path.open("rb"))


class Cursor:
    """Reads ascending rows of C-ordered parts that follow one another, holding one file open."""

    def __init__(self, parts: Sequence[StoredArray]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(part.shape[0] for part in parts)])
        self._open: tuple[int, BinaryIO, int] | None = None  # part, its file, where its data starts

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def take(self, rows: np.ndarray) -> np.ndarray:
        """These rows, ascending, as one array. Raises InputError where a file ends early."""
        first = self._parts[0]
        out = np.empty((len(rows), *first.shape[1:]), first.dtype)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for run in np.split(np.arange(len(rows)), breaks):
            self._fill(out, int(run[0]), int(rows[run[0]]), len(run))
        return out

    def _fill(self, out: np.ndarray, at: int, row: int, count: int) -> None:
        """Rows `row`.. of the whole into `out[at:]`, across parts."""
        while count:
            index = int(np.searchsorted(self._starts, row, side="right")) - 1
            here = min(count, int(self._starts[index + 1]) - row)
            target = out[at : at + here].reshape(-1).view(np.uint8)
            with reading(self._parts[index].where):
                file, data = self._at(index)
                file.seek(data + (row - int(self._starts[index])) * (target.nbytes // here))
                _read_exactly(file, target)
            at, row, count = at + here, row + here, count - here

    def _at(self, index: int) -> tuple[BinaryIO, int]:
        if self._open is None or self._open[0] != index:
            self.close()
            opener = self._parts[index].open
            assert opener is not None
            file = opener()
            _header(file)
            self._open = (index, file, file.tell())
        return self._open[1], self._open[2]


def _read_exactly(file: BinaryIO, target: np.ndarray) -> None:
    view = memoryview(target.data)
    while len(view):
        got = file.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise EOFError("the file is truncated")
        view = view[got:]
