"""Samples that are feeds: dicts of arrays, from Python or from a feed JSON.

What can be iterated over only once, or might differ the next time (a shuffling loader), is spooled to a
temporary file first.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxfuse.data.batch_axes import batch_axes
from onnxfuse.data.npz import reading
from onnxfuse.data.sample_checks import label_name, located, require_finite
from onnxfuse.data.sources import Reading
from onnxfuse.errors import InputError
from onnxfuse.ir.model import Feed
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.runtime.feeds import check_feed


class FeedSource:
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
        """Check every item, unless that was done.

        Args:
            name: names the samples in errors.
            items: feed dicts.
            inputs: of the model.
            checked: what `check_item` returned for each; None checks now.

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
                require_finite(array, f"{self._where(unit)} array '{name}'")
            yield feed, labels


def check_item(item: Any, where: str, inputs: Sequence[TensorInfo]) -> tuple[str | None, int]:
    """The name of a feed's labels, None without, and its number of samples.

    Args:
        item: the feed.
        where: names it in errors.
        inputs: of the model.

    Raises:
        InputError: it does not fit the inputs.
    """
    if not isinstance(item, Mapping):
        raise InputError(f"{where} is a {type(item).__name__}; each must be a dict of arrays by input name")
    label = label_name(where, item, inputs)
    feed = {n: np.asarray(v) if isinstance(v, np.generic) else v for n, v in item.items() if n != label}
    with located(where):
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


def spooled(name: str, items: Iterable[Any], inputs: Sequence[TensorInfo], limit: int | None) -> FeedSource:
    """Feeds that are run through once and kept, until there are enough.

    Args:
        name: names the samples in errors.
        items: feed dicts.
        inputs: of the model.
        limit: the number of samples that are enough; None keeps all.

    Raises:
        InputError: an item does not fit the inputs, or there are none.
    """
    kept = _Kept()
    checked = []
    for number, item in enumerate(items):
        where = f"{name} feed {number}"
        checked.append(check_item(item, where, inputs))
        with reading(f"{where}, which is kept in a temporary file"):
            kept.append(item)
        if limit is not None and sum(size for _, size in checked) >= limit:
            break
    return FeedSource(name, kept, inputs, checked)


class JsonFeeds(Sequence[Feed]):
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
