"""Samples for training: every one once in an epoch, in an order drawn anew for each.

A stream (`data.calibration.BatchStream`) reads well from end to end and badly in random order: a shuffled
epoch of an `.npz` takes 100 times as long as one in order, since a zip member can only be read forwards. So a
`Pool` reads the stream once, which also checks all values before training starts, and keeps it: in memory up
to `MEMORY_LIMIT`, beyond that in a temporary file that gives any row at once. `Shuffled` cuts mini-batches
from a pool.

Rows are recombined freely. Feeds (`FeedSource`) stay the batches they are, because the rows of one
may belong together; only their order is drawn.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxfuse.data.batch_axes import batch_axes
from onnxfuse.data.calibration import Batch, BatchStream
from onnxfuse.data.fitted import sample_digests
from onnxfuse.data.row_source import RowSource
from onnxfuse.errors import InputError
from onnxfuse.ir.model import Feed
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.progress import NoProgress, Progress
from onnxfuse.runtime.spool import Spool

MEMORY_LIMIT = 1 << 30
"""Bytes of one pool that are kept in memory."""

_CHUNK = 4096  # rows of labels looked at at a time


class Pool:
    """The samples of a stream, to be had in any order.

    An item is what can't be divided: a row, or a whole feed.

    Attributes:
        items: how many there are.
        samples: in all items together.
        step: rows of every batch, where the model insists; None where any number will do.
        whole: items are feeds, or rows of a model that takes one at a time, each a batch of its own.
        digest: of all values, in order.
        shared: items that hold a sample whose digest was in `without`.
        leaves_out: whether these are left out.
    """

    def __init__(
        self,
        batches: BatchStream,
        inputs: Sequence[TensorInfo],
        *,
        without: Collection[bytes] = (),
        limit: int = MEMORY_LIMIT,
        progress: Progress | None = None,
    ) -> None:
        """Read the stream.

        Args:
            batches: read once, from end to end.
            inputs: of the model, whose declared shapes say where the rows of an array are.
            without: `sample_digests` of samples to be left out. Where that is more than half of the items,
                they stay, since samples that common say nothing about where they come from.
            limit: bytes kept in memory.
            progress: hears how far it is.

        Raises:
            InputError: a value is NaN or infinite, a file is cut short, or temporary space has run out.
        """
        source, self._numbers = batches._source, batches._units
        self._row_by_row = isinstance(source, RowSource)
        self.whole = source.batch is not None and not source.exact
        self.step = source.batch if source.exact else None
        self._axes = batch_axes(inputs)
        self._limit = limit
        self._rows: dict[str | None, _RowStore] = {}  # by input; None holds the labels
        self._fixed: Feed = {}
        self._spool = Spool(limit)
        self._sizes: list[int] = []
        digest = hashlib.sha256()
        leave: list[bool] = []
        advance = (progress or NoProgress()).task("reading samples", total=len(batches))
        for batch in batches:
            _digest(digest, batch)
            found = sample_digests(batch.feed, inputs) if without else []
            if self.whole:
                self._keep_feed(batch)
                leave.append(any(item in without for item in found))
            else:
                self._keep_rows(batch, batches.samples)
                leave += [item in without for item in found] or [False] * batch.samples
            advance()
        self.digest = digest.hexdigest()
        self.shared = sum(leave)
        self.leaves_out = self.shared <= len(leave) // 2
        there = np.arange(len(leave))
        self._items = there[~np.array(leave, bool)] if self.leaves_out else there
        self.items = len(self._items)
        self.samples = int(np.array(self._sizes)[self._items].sum()) if self.whole else self.items
        self.labeled = batch.labels is not None

    def _keep_feed(self, batch: Batch) -> None:
        number = len(self._sizes)
        self._sizes.append(batch.samples)
        for name, array in batch.feed.items():
            self._spool.put(name, number, array)
        if batch.labels is not None:
            self._spool.put("", number, batch.labels)

    def _keep_rows(self, batch: Batch, count: int) -> None:
        if not self._rows:
            self._fixed = {name: array for name, array in batch.feed.items() if self._axes[name] is None}
            first = {name: rows[0] for name, rows in self._by_rows(batch)}
            memory = sum(row.nbytes for row in first.values()) * count <= self._limit
            self._rows = {name: _RowStore(row, count, memory) for name, row in first.items()}
        for name, rows in self._by_rows(batch):
            self._rows[name].put(rows)

    def _by_rows(self, batch: Batch) -> Iterator[tuple[str | None, np.ndarray]]:
        for name, array in batch.feed.items():
            axis = self._axes[name]
            if axis is not None:
                yield name, np.moveaxis(array, axis, 0)
        if batch.labels is not None:
            yield None, batch.labels

    def where(self, item: int, row: int) -> str:
        """The name of a row in messages, counted from that item."""
        if self._row_by_row:
            return f"row {self._numbers[self._items[item if self.whole else item + row]]}"
        return f"row {row} of feed {self._numbers[self._items[item]]}"

    def take(self, items: np.ndarray) -> Batch:
        """These items, numbers below `self.items`, as one batch; of feeds a single one."""
        places = self._items[items]
        if self.whole:
            (place,) = places.tolist()
            feed = {name: self._spool.get(name, place) for name in self._axes}
            labels = self._spool.get("", place) if self.labeled else None
            return Batch(feed, labels, place, self._sizes[place])
        labels = self._rows[None].take(places) if None in self._rows else None
        feed = {
            name: self._fixed[name] if axis is None else np.moveaxis(self._rows[name].take(places), 0, axis)
            for name, axis in self._axes.items()
        }
        return Batch(feed, labels, int(places[0]), len(places))

    def in_order(self, size: int) -> Iterator[Batch]:
        """All items once, as they came, in batches of `size` rows where the pool leaves that open."""
        step = 1 if self.whole else self.step or size
        for start in range(0, self.items, step):
            yield self.take(np.arange(start, min(start + step, self.items)))

    def labels(self) -> Iterator[tuple[int, np.ndarray]]:
        """All labels: (the first item they belong to, the labels of one feed or of some rows)."""
        for start in range(0, self.items, 1 if self.whole else _CHUNK):
            if self.whole:
                yield start, self._spool.get("", int(self._items[start]))
            else:
                yield start, self._rows[None].take(self._items[start : start + _CHUNK])


def _digest(digest: hashlib._Hash, batch: Batch) -> None:
    for name, array in (*batch.feed.items(), ("", batch.labels)):
        if array is not None:
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())


class _RowStore:
    """The rows of one array, in memory or in a temporary file; put in order, taken in any."""

    def __init__(self, row: np.ndarray, count: int, memory: bool) -> None:
        self._like = row
        self._put = 0
        self._array = np.empty((count, *row.shape), row.dtype) if memory or row.dtype.hasobject else None
        self._file = tempfile.TemporaryFile(buffering=0) if self._array is None else None  # noqa: SIM115

    def put(self, rows: np.ndarray) -> None:
        if self._array is not None:
            self._array[self._put : self._put + len(rows)] = rows
        else:
            self._write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
        self._put += len(rows)

    def _write(self, data: memoryview) -> None:
        assert self._file is not None
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise InputError(
                f"cannot keep the samples in {tempfile.gettempdir()}: {error.strerror or error}; "
                "free some space or set TMPDIR"
            ) from error

    def take(self, places: np.ndarray) -> np.ndarray:
        """A new array of the rows at `places`."""
        if self._array is not None:
            return np.asarray(self._array[places])
        assert self._file is not None
        found = np.empty((len(places), *self._like.shape), self._like.dtype)
        for row, place in zip(found.reshape(len(places), -1).view(np.uint8), places, strict=True):
            self._file.seek(int(place) * self._like.nbytes)
            data = row.data
            while data:
                count = self._file.readinto(data)
                data = data[count:]
        return found


@dataclass(frozen=True)
class InOrder:
    """The batches of a pool, in order, as often as they are asked for."""

    pool: Pool
    size: int

    def __iter__(self) -> Iterator[Batch]:
        return self.pool.in_order(self.size)


class Shuffled:
    """The mini-batches of an epoch, drawn from its number and the seed alone: a resumed run has the same.

    Of several processes each takes its share of every batch; the shares of a batch are equally large, so that
    the mean of the processes' gradients is the batch's.

    Attributes:
        steps: batches in an epoch.
    """

    def __init__(self, pool: Pool, size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        """
        Args:
            pool: where the samples are.
            size: rows of a batch, of all processes together, where the pool leaves that open. The last batch
                may have fewer; it is left out where no more than one row of it falls to a process, which
                BatchNorm can't train on.
            seed: of the order.
            rank, world: which process this is, and of how many.

        Raises:
            InputError: there are fewer samples, or rows in a batch, than processes.
        """
        self._pool, self._seed, self._rank = pool, seed, rank
        share = 1 if pool.whole else pool.step or size // world
        if share < 1:
            raise InputError(f"--batch-size {size} is less than a row for each of {world} processes")
        full, rest = divmod(pool.items, share * world)
        self._shares = [share] * full
        if not pool.whole and pool.step is None and rest // world > (1 if full else 0):
            self._shares.append(rest // world)
        if not self._shares:
            kind = "feeds" if pool.whole else "samples"
            raise InputError(f"too few {kind} to train on, {pool.items}: it takes at least {share * world}")
        self._world = world
        self.steps = len(self._shares)

    def epoch(self, number: int) -> Iterator[Batch]:
        """This process's share of every batch of that epoch."""
        order = np.random.default_rng([self._seed, number]).permutation(self._pool.items)
        start = 0
        for share in self._shares:
            first = start + self._rank * share
            yield self._pool.take(order[first : first + share])
            start += share * self._world
