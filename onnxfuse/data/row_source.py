"""Samples that are rows of arrays: in memory, in an `.npz`, or in a folder of `.npy` or `.npz` files.

Arrays that lie in files in C order are read row by row. Others (Fortran order, samples along an inner axis)
are loaded whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxfuse.data.batch_axes import batch_axes, fixed_batch
from onnxfuse.data.npz import Cursor, StoredArray
from onnxfuse.data.sample_checks import label_name, located, require_finite
from onnxfuse.data.sources import Reading
from onnxfuse.errors import InputError
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.runtime.feeds import check_type

Take = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _Column:
    """One input's samples: `parts` one after the other along `axis`; no axis: the same value for every batch.

    `stacked`: each row is a whole feed of this input (the array has one more axis than the input).
    """

    parts: Sequence[StoredArray]
    axis: int | None
    stacked: bool = False

    @property
    def rows(self) -> int | None:
        return None if self.axis is None else sum(part.shape[self.axis] for part in self.parts)

    @contextlib.contextmanager
    def taking(self) -> Iterator[Take]:
        """A function from ascending row numbers to the array to feed."""
        if self.axis == 0 and all(part.open is not None and part.c_order for part in self.parts):
            with contextlib.closing(Cursor(self.parts)) as cursor:
                yield (lambda rows: np.asarray(cursor.take(rows)[0])) if self.stacked else cursor.take
            return
        array = self._whole()
        if self.axis is None:
            yield lambda rows: array
        elif self.stacked:
            yield lambda rows: np.asarray(array[rows[0]])
        else:
            axis = self.axis
            yield lambda rows: np.take(array, rows, axis)

    def numbers(self, rows: np.ndarray) -> np.ndarray | int | None:
        """For messages: the row number at each place of the first axis taken, or the one row taken."""
        if self.axis != 0:
            return None
        return int(rows[0]) if self.stacked else rows

    def _whole(self) -> np.ndarray:
        arrays = [part.load() for part in self.parts]
        if self.axis is not None:
            return np.concatenate(arrays, self.axis) if len(arrays) > 1 else arrays[0]
        for part, array in zip(self.parts[1:], arrays[1:], strict=True):
            if not np.array_equal(array, arrays[0]):
                raise InputError(f"{part.where} differs from {self.parts[0].where}, but it has no batch axis")
        return arrays[0]


class RowSource:
    """Samples as rows of arrays by input name."""

    def __init__(
        self, name: str, arrays: Mapping[str, Sequence[StoredArray]], inputs: Sequence[TensorInfo]
    ) -> None:
        """Match arrays with inputs.

        Args:
            name: names the samples in errors.
            arrays: by input name the parts that follow one another.
            inputs: of the model.

        Raises:
            InputError: names, types, shapes or row counts do not fit the model, or there are no rows.
        """
        self.name = name
        self.labels = label_name(name, arrays, inputs)
        axes = batch_axes(inputs)
        self._columns = {info.name: _column(arrays[info.name], info, axes[info.name]) for info in inputs}
        stacked = any(column.stacked for column in self._columns.values())
        self.batch = 1 if stacked else fixed_batch(inputs, axes)
        if all(column.axis is None for column in self._columns.values()):
            self.batch = 1
        self.exact = self.batch is not None and self.batch > 1
        if self.labels is not None:
            self._columns[self.labels] = _label_column(arrays[self.labels])
        self.count = self._count()

    def _count(self) -> int:
        counts = {name: column.rows for name, column in self._columns.items() if column.rows is not None}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"'{name}' {rows}" for name, rows in counts.items())
            raise InputError(f"{self.name}: the arrays have different numbers of rows: {said}")
        count = next(iter(counts.values()), 1)
        if count == 0:
            raise InputError(f"{self.name} has no rows")
        return count

    def samples(self, units: np.ndarray) -> int:
        return len(units)

    def read(self, groups: Iterable[np.ndarray]) -> Iterator[Reading]:
        with contextlib.ExitStack() as stack:
            take = {name: stack.enter_context(column.taking()) for name, column in self._columns.items()}
            for rows in groups:
                feed = {name: function(rows) for name, function in take.items()}
                for name, array in feed.items():
                    require_finite(array, f"{self.name} array '{name}'", self._columns[name].numbers(rows))
                labels = feed.pop(self.labels) if self.labels is not None else None
                yield feed, labels


def _column(parts: Sequence[StoredArray], info: TensorInfo, axis: int | None) -> _Column:
    stacked = info.shape is not None and len(parts[0].shape) == len(info.shape) + 1
    column = _Column(parts, 0 if stacked else axis, stacked)
    shape = info.shape
    if shape is not None:
        shape = (
            (None, *shape) if stacked else tuple(None if i == axis else dim for i, dim in enumerate(shape))
        )
    for part in parts:
        with located(part.where):
            check_type(replace(info, shape=shape), part.dtype, part.shape)
    _check_alike(parts, column.axis)
    return column


def _label_column(parts: Sequence[StoredArray]) -> _Column:
    for part in parts:
        if not part.shape or part.dtype.kind not in "biuf":
            raise InputError(f"{part.where} must hold numbers, one row for each sample, to serve as labels")
    _check_alike(parts, 0)
    return _Column(parts, 0)


def _check_alike(parts: Sequence[StoredArray], axis: int | None) -> None:
    """Parts that follow one another along `axis` agree in type and in every other size."""

    def form(part: StoredArray) -> tuple[object, ...]:
        return (part.dtype, len(part.shape), *(size for i, size in enumerate(part.shape) if i != axis))

    for part in parts[1:]:
        if form(part) != form(parts[0]):
            first = parts[0]
            raise InputError(
                f"{part.where} is {part.dtype} {list(part.shape)}, "
                f"it does not continue {first.where}, {first.dtype} {list(first.shape)}"
            )
