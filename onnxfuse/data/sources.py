"""Where samples come from: one small class for each kind of data, all read as a stream.

A source is either *rows* (arrays by input name whose rows are samples; batches are cut from them) or *feeds*
(one dict of arrays after another, each a batch as it is). Both are addressed by units, a unit being a row or
a feed: `read` gets groups of ascending unit numbers and returns one feed for each, holding no more than that.
What can be iterated over only once, or might differ the next time (a shuffling loader), is spooled to a
temporary file first.

Types, shapes, names and counts are checked when a source is opened, values (NaN, infinity) while it is read.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from onnxfuse.data.npz import Cursor, Stored, npy_array, npz_arrays, reading
from onnxfuse.data.userscript import UserFunction, is_script
from onnxfuse.errors import InputError
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.runtime.feeds import check_feed, check_type
from onnxfuse.runtime.session import Feed

LABELS = ("labels", "y", "label", "targets")
_BATCH_NAME = re.compile(r"batch|^(n|b|bs)$", re.IGNORECASE)

Reading = tuple[Feed, "np.ndarray | None"]


class Source(Protocol):
    """Samples in units (rows or feeds), each unit a number below `count`."""

    name: str
    count: int
    labels: str | None
    batch: int | None  # units that make one batch, where the model or the data dictates it
    exact: bool  # a batch of fewer units can't be run

    def samples(self, units: np.ndarray) -> int:
        """How many samples these units hold."""
        ...

    def read(self, groups: Iterable[np.ndarray]) -> Iterator[Reading]:
        """One feed and its labels for each group of ascending units."""
        ...


# --- the batch axis ----------------------------------------------------------------------------------


def batch_axes(inputs: Sequence[TensorInfo]) -> dict[str, int | None]:
    """The axis of each input that counts samples; None for an input that is the same for all of them.

    If some dimension is named like a batch, it is the axis so named: 1 for [2, batch, 128]. Otherwise it is
    the axis named like the first axis of the first input with a name there, or else axis 0 where it is
    dynamic, since some exporters give every dimension a name of its own. If no first axis is dynamic, it is
    axis 0 of every input that has as many rows as the first.
    """
    shapes = {info.name: info.shape for info in inputs}
    leading = [shape[0] for shape in shapes.values() if shape]
    dims = {dim for shape in shapes.values() for dim in shape or () if isinstance(dim, str)}
    batch: set[str | None] = {dim for dim in dims if _BATCH_NAME.search(dim)}
    first = next((dim for dim in leading if isinstance(dim, str)), None)
    dynamic = batch or first or None in leading or None in shapes.values()
    fixed = leading[0] if leading and not dynamic else None

    def axis(shape: tuple[int | str | None, ...] | None) -> int | None:
        if shape is None:
            return 0
        named = [i for i, dim in enumerate(shape) if dim is not None and dim in (batch or {first})]
        if named or not shape:
            return named[0] if named else None
        unnamed = shape[0] is None or (isinstance(shape[0], str) and not batch)
        return 0 if unnamed or (fixed is not None and shape[0] == fixed) else None

    return {name: axis(shape) for name, shape in shapes.items()}


def fixed_batch(inputs: Sequence[TensorInfo], axes: Mapping[str, int | None]) -> int | None:
    """The number of rows that the model declares for a batch, None where any will do."""
    for info in inputs:
        axis = axes[info.name]
        if axis is not None and info.shape is not None:
            dim = info.shape[axis]
            if isinstance(dim, int):
                return dim
    return None


# --- rows --------------------------------------------------------------------------------------------

Take = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _Column:
    """One input's samples: `parts` one after the other along `axis`; no axis: the same value for every batch.

    `stacked`: each row is a whole feed of this input (the array has one more axis than the input).
    """

    parts: Sequence[Stored]
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


class Rows:
    """Samples as rows of arrays by input name."""

    def __init__(
        self, name: str, arrays: Mapping[str, Sequence[Stored]], inputs: Sequence[TensorInfo]
    ) -> None:
        """Match arrays with inputs.

        Raises:
            InputError: names, types, shapes or row counts do not fit the model, or there are no rows.
        """
        self.name = name
        self.labels = _check_names(name, arrays, inputs)
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
                    check_finite(array, f"{self.name} array '{name}'", self._columns[name].numbers(rows))
                labels = feed.pop(self.labels) if self.labels is not None else None
                yield feed, labels


def _check_names(name: str, arrays: Iterable[str], inputs: Sequence[TensorInfo]) -> str | None:
    """The name of the label array among `arrays`, once every other one is an input and none is missing."""
    wanted = [info.name for info in inputs]
    listed = ", ".join(f"'{w}'" for w in wanted)
    if missing := [w for w in wanted if w not in arrays]:
        got = ", ".join(f"'{a}'" for a in arrays) or "nothing"
        raise InputError(f"{name} has no array '{missing[0]}'; the model's inputs are {listed}, it has {got}")
    extra = [a for a in arrays if a not in wanted]
    label = next((a for a in LABELS if a in extra), None)
    if unknown := [a for a in extra if a != label]:
        raise InputError(
            f"{name} has an array '{unknown[0]}' that is no input; the model's inputs are {listed}, "
            f"and one array of labels may be called {', '.join(LABELS)}"
        )
    return label


def _column(parts: Sequence[Stored], info: TensorInfo, axis: int | None) -> _Column:
    stacked = info.shape is not None and len(parts[0].shape) == len(info.shape) + 1
    column = _Column(parts, 0 if stacked else axis, stacked)
    shape = info.shape
    if shape is not None:
        shape = (
            (None, *shape) if stacked else tuple(None if i == axis else dim for i, dim in enumerate(shape))
        )
    for part in parts:
        with _located(part.where):
            check_type(replace(info, shape=shape), part.dtype, part.shape)
    _check_alike(parts, column.axis)
    return column


def _label_column(parts: Sequence[Stored]) -> _Column:
    for part in parts:
        if not part.shape or part.dtype.kind not in "biuf":
            raise InputError(f"{part.where} must hold numbers, one row for each sample, to serve as labels")
    _check_alike(parts, 0)
    return _Column(parts, 0)


def _check_alike(parts: Sequence[Stored], axis: int | None) -> None:
    """Parts that follow one another along `axis` agree in type and in every other size."""

    def form(part: Stored) -> tuple[object, ...]:
        return (part.dtype, len(part.shape), *(size for i, size in enumerate(part.shape) if i != axis))

    for part in parts[1:]:
        if form(part) != form(parts[0]):
            first = parts[0]
            raise InputError(
                f"{part.where} is {part.dtype} {list(part.shape)}, "
                f"it does not continue {first.where}, {first.dtype} {list(first.shape)}"
            )


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def check_finite(array: np.ndarray, where: str, rows: np.ndarray | int | None = None) -> None:
    """Raise InputError where `array` holds NaN or infinity.

    `rows` are the numbers that its rows have in the data, or the number of the one row that it is.
    """
    if array.dtype.kind not in "fc" or np.isfinite(array).all():
        return
    if isinstance(rows, np.ndarray):
        rows = int(rows[np.argwhere(~np.isfinite(array))[0, 0]])
    at = "" if rows is None else f" in row {rows}"
    raise InputError(f"{where} holds NaN or infinity{at}; remove such samples")


# --- feeds -------------------------------------------------------------------------------------------


class Feeds:
    """Samples as feed dicts, each a batch as it is."""

    batch: int | None = 1
    exact = False

    def __init__(
        self,
        name: str,
        items: Sequence[Any],
        inputs: Sequence[TensorInfo],
        checked: Sequence[tuple[str | None, int]] | None = None,
    ) -> None:
        """Check every item, unless that was done: `checked` is what `check_item` said of each.

        Raises:
            InputError: an item does not fit the inputs, or there are none.
        """
        self.name = name
        self.count = len(items)
        self._items = items
        if self.count == 0:
            raise InputError(f"{name} has no feeds")
        if checked is None:
            checked = [check_item(items[unit], self._where(unit), inputs) for unit in range(self.count)]
        self._sizes = np.array([size for _, size in checked])
        labels = {label for label, _ in checked}
        if len(labels) > 1:
            raise InputError(f"{name}: the feeds do not agree on the name of their labels, or some have none")
        (self.labels,) = labels

    def _where(self, unit: int) -> str:
        return f"{self.name} feed {unit}"

    def samples(self, units: np.ndarray) -> int:
        return int(self._sizes[units].sum())

    def read(self, groups: Iterable[np.ndarray]) -> Iterator[Reading]:
        for units in groups:
            unit = int(units[0])
            feed = {name: np.asarray(value) for name, value in self._items[unit].items()}
            labels = feed.pop(self.labels) if self.labels is not None else None
            for name, array in feed.items():
                check_finite(array, f"{self._where(unit)} array '{name}'")
            yield feed, labels


def check_item(item: Any, where: str, inputs: Sequence[TensorInfo]) -> tuple[str | None, int]:
    """(name of the labels, number of samples) of a feed. Raises InputError unless it fits `inputs`."""
    if not isinstance(item, Mapping):
        raise InputError(f"{where} is a {type(item).__name__}; each must be a dict of arrays by input name")
    label = _check_names(where, item, inputs)
    feed = {n: np.asarray(v) if isinstance(v, np.generic) else v for n, v in item.items() if n != label}
    with _located(where):
        check_feed(feed, inputs)
    axes = batch_axes(inputs)
    # An input of unknown rank may be fed a scalar.
    sizes = {feed[n].shape[axis] for n, axis in axes.items() if axis is not None and feed[n].ndim > axis}
    if len(sizes) > 1:
        raise InputError(f"{where}: the arrays have different numbers of rows: {sorted(sizes)}")
    size = sizes.pop() if sizes else 1
    if size == 0:
        raise InputError(f"{where} has no rows")
    if label is not None and np.shape(item[label])[:1] != (size,):
        got = list(np.shape(item[label]))
        raise InputError(f"{where}: '{label}' has shape {got}, not one row for each of {size} samples")
    return label, size


class _Kept(Sequence[Feed]):
    """Feeds kept in a temporary file, in the order they came."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this does
        self._places: list[dict[str, int]] = []

    def append(self, feed: Mapping[str, np.ndarray]) -> None:
        self._file.seek(0, io.SEEK_END)
        places = {}
        for name, array in feed.items():
            places[name] = self._file.tell()
            np.lib.format.write_array(self._file, np.asarray(array), allow_pickle=False)
        self._places.append(places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        feed = {}
        for name, place in self._places[index].items():
            self._file.seek(place)
            feed[name] = np.lib.format.read_array(self._file, allow_pickle=False)
        return feed


def _spooled(name: str, items: Iterable[Any], inputs: Sequence[TensorInfo], limit: int | None) -> Feeds:
    """Run through `items` once and keep them, until there are `limit` samples."""
    kept = _Kept()
    checked = []
    for number, item in enumerate(items):
        where = f"{name} feed {number}"
        checked.append(check_item(item, where, inputs))
        with reading(f"{where}, which is kept in a temporary file"):
            kept.append(item)
        if limit is not None and sum(size for _, size in checked) >= limit:
            break
    return Feeds(name, kept, inputs, checked)


# --- feed JSON ---------------------------------------------------------------------------------------


class _JsonFeeds(Sequence[Feed]):
    """Polygraphy's `--save-inputs` file: a list of feeds, each array a base64 text of its .npy bytes.

    Decoded one feed at a time; the text itself is in memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with reading(f"'{path}'"):
            self._items = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(self._items, list) or not all(isinstance(item, dict) for item in self._items):
            raise InputError(
                f"'{path}' is not a feed JSON: it must be a list of dicts of arrays by input name"
            )

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        where = f"'{self._path}' feed {index}"
        return {name: _decode(value, f"{where} array '{name}'") for name, value in self._items[index].items()}


def _decode(value: Any, where: str) -> np.ndarray:
    text = value.get("array") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise InputError(f"{where} is not a NumPy array as Polygraphy saves it")
    with reading(where):
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            data = text.encode("latin-1")  # how the first versions wrote it
        array = np.load(io.BytesIO(data), allow_pickle=False)
    return array if isinstance(array, np.ndarray) else next(iter(array.values()))


# --- opening -----------------------------------------------------------------------------------------


def open_source(source: Any, inputs: Sequence[TensorInfo], limit: int | None) -> Source:
    """The samples that `source` stands for: a path, `script.py:function`, an array, a dict of arrays, or
    feeds.

    Raises:
        InputError: nothing there, of no known kind, or it does not fit `inputs`.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _open_feeds(source, "the samples", inputs, limit)
    text = os.fspath(source)
    if is_script(text):
        function = UserFunction.load(text, default="load_data")
        return _open_feeds(function(), function.name, inputs, limit, function)
    path = Path(text)
    if path.is_dir():
        return _open_folder(path, inputs)
    if not path.exists():
        raise InputError(f"no calibration data at '{path}'")
    if path.suffix == ".npz":
        return Rows(f"'{path}'", {name: [array] for name, array in npz_arrays(path).items()}, inputs)
    if path.suffix == ".json":
        return Feeds(f"'{path}'", _JsonFeeds(path), inputs)
    kinds = ".npz, a folder of .npy or .npz, a feed .json or script.py:load_data"
    raise InputError(f"calibration data must be a {kinds}, not '{path}'")


def _open_feeds(
    items: Any, name: str, inputs: Sequence[TensorInfo], limit: int | None, script: UserFunction | None = None
) -> Source:
    """Feeds from Python: one dict of whole arrays is rows, and so is one array for the only input; a sequence
    of feeds is used in place, the rest spooled."""
    if isinstance(items, np.ndarray):
        items = {_only(name, inputs): items}
    if isinstance(items, Mapping):
        return Rows(name, {key: [_in_memory(name, key, value)] for key, value in items.items()}, inputs)
    if isinstance(items, Sequence) and not isinstance(items, (str, bytes)):
        return Feeds(name, items, inputs)
    if not isinstance(items, Iterable) or isinstance(items, (str, bytes)):
        raise InputError(f"{name} is a {type(items).__name__}, not an iterable of feed dicts")
    return _spooled(name, items if script is None else script.iterate(items), inputs, limit)


def _only(name: str, inputs: Sequence[TensorInfo]) -> str:
    """The name of the only input, for samples that are a bare array."""
    if len(inputs) != 1:
        listed = ", ".join(f"'{info.name}'" for info in inputs) or "none"
        raise InputError(f"{name}: one array is for a model with one input; give a dict of arrays: {listed}")
    return inputs[0].name


def _in_memory(name: str, key: str, value: Any) -> Stored:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise InputError(f"{name} array '{key}' is a {type(value).__name__}, not a NumPy array")
    array = np.asarray(value)
    return Stored(f"{name} array '{key}'", array.dtype, array.shape, array=array)


def _open_folder(folder: Path, inputs: Sequence[TensorInfo]) -> Rows:
    """One `.npy` for each input, or `.npz` chunks that continue one another, 2 before 10."""
    files = sorted((f for f in folder.iterdir() if f.suffix in (".npy", ".npz")), key=_natural)
    kinds = {file.suffix for file in files}
    if len(kinds) != 1:
        problem = "mixes .npy and .npz files" if kinds else "holds no .npy or .npz file"
        raise InputError(f"'{folder}' {problem}; it must hold one .npy for each input, or .npz chunks")
    arrays: dict[str, list[Stored]] = {}
    if kinds == {".npy"}:
        names = {_file_name(info.name): info.name for info in inputs}
        arrays = {names.get(file.stem, file.stem): [npy_array(file)] for file in files}
        return Rows(f"'{folder}'", arrays, inputs)
    for file in files:
        chunk = npz_arrays(file)
        if arrays and chunk.keys() != arrays.keys():
            raise InputError(
                f"'{file}' holds the arrays {sorted(chunk)}, '{files[0]}' holds {sorted(arrays)}"
            )
        for name, stored in chunk.items():
            arrays.setdefault(name, []).append(stored)
    return Rows(f"'{folder}'", arrays, inputs)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _file_name(name: str) -> str:
    """An input's name as a file can carry it: `serving/input:0` is `serving_input_0`."""
    return re.sub(r"[^\w.-]", "_", name)
