"""Calibration: the samples a pass may look at, split into those it fits and those its error is measured on.

The split is by samples, drawn once from the seed: the samples are cut into as many stretches of equal
length as are to be held out, and one is drawn from each. So files sorted by class, cyclic ones and short
ones split fairly, and the same data and seed give the same split, at any batch size. An error quoted on
fitted samples would flatter the pass.

Nothing but the batch in hand is in memory, and batches are no larger than a memory budget allows; both
halves can be iterated over as often as needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np

from onnxfuse.data.batch_rows import rows_within
from onnxfuse.data.fitted import Fitted, sample_digests
from onnxfuse.data.opening import open_source
from onnxfuse.data.sources import Source
from onnxfuse.data.synthetic import Synthetic
from onnxfuse.errors import InputError
from onnxfuse.ir.model import Feed, Model
from onnxfuse.ir.shapes import TensorInfo
from onnxfuse.runtime.memory import Budget
from onnxfuse.runtime.session import Runtime

Data = str | PathLike[str] | np.ndarray | Mapping[str, np.ndarray] | Iterable[Mapping[str, np.ndarray]] | None


@dataclass(frozen=True)
class Batch:
    """One feed of all inputs, with its labels if the data has any; `index` is unique in its calibration."""

    feed: Feed
    labels: np.ndarray | None
    index: int
    samples: int


class BatchStream:
    """A re-iterable stream of batches of one source."""

    def __init__(self, source: Source, units: np.ndarray, size: int, first_index: int) -> None:
        """A stream of some units of a source.

        Args:
            source: has the samples.
            units: their numbers, ascending.
            size: units in a batch.
            first_index: the number of the first batch.
        """
        self._source = source
        self._units = units
        self._size = size
        self._first_index = first_index
        self.samples = source.samples(units)

    @property
    def name(self) -> str:
        """What messages call the samples."""
        return self._source.name

    @property
    def rows(self) -> int:
        """Samples in the largest batch."""
        return max(map(self._source.samples, self._groups()), default=0)

    def __len__(self) -> int:
        return -(-len(self._units) // self._size)

    def _groups(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self._units), self._size):
            yield self._units[start : start + self._size]

    def fresh(self, fitted: Fitted, inputs: Sequence[TensorInfo]) -> np.ndarray:
        """Whether each unit is new to a model that was fitted to some samples: bool (units,)."""
        return fitted.fresh(self.feeds(), [len(group) for group in self._groups()], inputs)

    def feeds(self) -> Iterator[Feed]:
        """The feeds of all batches."""
        return (batch.feed for batch in self)

    def digests(self, inputs: Sequence[TensorInfo]) -> Iterator[bytes]:
        """A digest of each sample, for a model of these inputs."""
        return (digest for feed in self.feeds() for digest in sample_digests(feed, inputs))

    def only(self, chosen: np.ndarray) -> BatchStream | None:
        """The stream of those units where `chosen` is true, or as many as fill whole batches where the model
        wants them; None where none are left."""
        units = self._units[chosen]
        if self._source.exact:
            units = units[: len(units) // self._size * self._size]
        return self._of(units, self._first_index) if len(units) else None

    def _of(self, units: np.ndarray, first_index: int) -> BatchStream:
        """The stream of some units, in batches as here."""
        return BatchStream(self._source, units, self._size, first_index)

    @property
    def _step(self) -> int:
        """Units that only go together."""
        return self._size if self._source.exact else 1

    def _chosen(self, numbers: np.ndarray) -> np.ndarray:
        """The units of these steps."""
        return self._units[(numbers[:, None] * self._step + np.arange(self._step)).reshape(-1)]

    def split(self, samples: int) -> tuple[BatchStream, BatchStream]:
        """About `samples` of the samples, spread over the stream: two thirds of them, and the rest.

        One that can't be divided serves as both.
        """
        total = len(self._units) // self._step
        count = min(total, max(2, -(-samples * total // self.samples)))
        chosen = np.arange(count) * total // count
        second = chosen[1::3] if count > 1 else chosen
        first = np.setdiff1d(chosen, second) if count > 1 else chosen
        fit = self._of(self._chosen(first), 0)
        return fit, self._of(self._chosen(second), len(fit))

    def some(self, samples: int) -> BatchStream:
        """The stream of about so many of the samples, spread over this one."""
        total = len(self._units) // self._step
        count = min(total, -(-samples * total // max(self.samples, 1)))
        chosen = np.arange(count) * total // max(count, 1)
        return self._of(self._chosen(chosen), self._first_index)

    def numbers(self, samples: int) -> tuple[int, ...] | None:
        """The numbers of batches, spread over the stream, that have about so many samples; None where those
        are all."""
        count = -(-samples * len(self) // max(self.samples, 1))
        if count >= len(self):
            return None
        return tuple(self._first_index + place * len(self) // count for place in range(count))

    def numbered(self, numbers: Collection[int]) -> Iterator[Batch]:
        """Its batches of these numbers alone."""
        return self._batches([n - self._first_index for n in sorted(numbers)])

    def joined(self, other: BatchStream) -> BatchStream:
        """The stream of the units of both, which are of one source."""
        return self._of(np.union1d(self._units, other._units), 0)

    def without(self, other: BatchStream) -> BatchStream:
        """The stream of those units that are not in `other`, a part of this one; itself where none are
        left."""
        left = np.setdiff1d(self._units, other._units)
        return self._of(left, 0) if len(left) else self

    def cut(self, rows: int) -> BatchStream:
        """The same samples in batches of at most so many rows, where model and data leave that open."""
        size = self._size if self._source.batch is not None else min(rows, self._size)
        return BatchStream(self._source, self._units, size, self._first_index)

    def __iter__(self) -> Iterator[Batch]:
        return self._batches(range(len(self)))

    def _batches(self, places: Sequence[int]) -> Iterator[Batch]:
        groups = [self._units[place * self._size : (place + 1) * self._size] for place in places]
        readings = self._source.read(groups)
        for place, units, (feed, labels) in zip(places, groups, readings, strict=True):
            yield Batch(feed, labels, self._first_index + place, self._source.samples(units))


class Calibration:
    """Samples for fitting and samples held out. Made by `Calibration.open`.

    Attributes:
        fit: what passes may learn from.
        held_out: what their error is measured on; empty where none was asked for.
        samples: in both together.
        rows: in the largest batch.
        synthetic: True where the samples are made up.
        labels: the name of the label array, None without.
        description: one line for reports.
        budget: the memory that steps over the samples may take.
        refitted: whether every sample was fitted in an earlier run, those held out now as well.
    """

    def __init__(
        self,
        fit: BatchStream,
        held_out: BatchStream,
        labels: str | None,
        synthetic: bool,
        description: str,
        budget: Budget,
        refitted: bool = False,
    ) -> None:
        """Takes over both halves; `open` makes them.

        Args:
            fit, held_out: the samples.
            labels: the name of the label array, None without.
            synthetic: whether they are made up.
            description: one line for reports.
            budget: the memory that steps over the samples may take.
            refitted: whether every sample was fitted in an earlier run.
        """
        self.fit = fit
        self.held_out = held_out
        self.samples = fit.samples + held_out.samples
        self.rows = max(fit.rows, held_out.rows)
        self.labels = labels
        self.synthetic = synthetic
        self.description = description
        self.budget = budget
        self.refitted = refitted

    def part(self, samples: int) -> Calibration:
        """About `samples` of the fit samples, a third of them held out, for trials that must leave the real
        held-out samples alone. Trials run side by side: each has a quarter of the memory."""
        fit, rest = self.fit.split(samples)
        budget = Budget(self.budget.total // 4)
        return Calibration(fit, rest, self.labels, self.synthetic, self.description, budget)

    def apart(self, samples: int) -> Calibration:
        """All the fit samples, of which those are held out that `part(samples)` holds out: what is judged
        there may be fitted to all the others."""
        _, judged = self.fit.split(samples)
        rest = self.fit.without(judged)
        return Calibration(rest, judged, self.labels, self.synthetic, self.description, self.budget)

    @classmethod
    def open(
        cls,
        source: Data,
        model: Model,
        *,
        limit: int | None = None,
        batch_size: int = 64,
        budget: Budget | None = None,
        held_out: float = 0.2,
        seed: int = 0,
    ) -> Calibration:
        """The samples of `source` for `model`.

        Args:
            source: a `.npz` (arrays by input name, rows are samples); a folder of `.npy`, one for each
                input, or of `.npz`, chunks that continue one another; a Polygraphy feed `.json`;
                `script.py:function`, which is called without arguments and returns feeds; a dict of whole
                arrays, or the one array of a model with one input; an iterable of feed dicts; or None:
                samples are made up. An array called labels, y, label, targets or target holds the
                labels.
            model: whose inputs the samples must fit; types are not cast.
            limit: use about this many samples, spread over the data; of a stream the first ones.
            batch_size: the most rows of a batch, where neither model nor data fixes their number; there are
                fewer where `budget` asks for it.
            budget: the memory that steps over the samples may take; None is `Budget.of(None)`.
            held_out: the share of samples that is held out.
            seed: of the split, the limit's choice and made-up samples.

        Raises:
            InputError: the data cannot be read, does not fit the model, or is too little to split. What only
                the values show (NaN, a file cut short) is raised here for the first row, else while
                iterating.
        """
        if batch_size < 1 or not 0 <= held_out < 1 or (limit is not None and limit < 1):
            raise InputError(
                "batch size and limit must be at least 1, the held-out share at least 0 and below 1"
            )
        budget = budget or Budget.of(None)
        opened: Source
        if source is None:
            opened = Synthetic(model, batch_size, limit, seed, budget)
        else:
            opened = open_source(source, model.inputs, limit)
        units = np.arange(opened.count) if source is None else _limited(opened, limit, seed)
        size = opened.batch or _rows(opened, model, batch_size, budget)
        fresh = np.ones(len(units), bool)
        if held_out and (earlier := Fitted.read(model)):
            fresh = BatchStream(opened, units, size, 0).fresh(earlier, model.inputs)
        fitted, held = _split(opened, units, size, held_out, seed, fresh)
        fit = BatchStream(opened, fitted, size, 0)
        rest = BatchStream(opened, held, size, len(fit))
        dropped = len(units) - len(fitted) - len(held)
        description = f"{opened.name}: {fit.samples} samples fitted, {rest.samples} held out"
        if dropped:
            description += f", {dropped} left over because the model wants batches of {size}"
        refitted = not fresh[np.isin(units, held)].all()
        return cls(fit, rest, opened.labels, source is None, description, budget, refitted)


def _rows(source: Source, model: Model, most: int, budget: Budget) -> int:
    """Rows of a batch, where neither model nor data fixes their number."""
    feed, _ = next(iter(source.read([np.arange(1)])))
    found = rows_within(model, feed, budget.batch, Runtime("cpu"))
    return most if found is None else min(most, found)


def _limited(source: Source, limit: int | None, seed: int) -> np.ndarray:
    units = np.arange(source.count)
    total = source.samples(units)
    if limit is None or limit >= total:
        return units
    return _spread(source.count, -(-source.count * limit // total), seed)


def _split(
    source: Source, units: np.ndarray, size: int, share: float, seed: int, fresh: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(fitted, held out) units, each a whole number of batches where the model insists on full ones. Only
    fresh units are held out, if there are enough for one."""
    step = size if source.exact else 1
    parts = len(units) // step
    if parts < (2 if share else 1):
        need = f"{(2 if share else 1) * step}" + (", to fit some and hold out others" if share else "")
        what = "samples" if source.batch is None or source.exact else "batches"
        raise InputError(f"{source.name}: too few {what}, {len(units)}; it takes at least {need}")
    new = np.flatnonzero(fresh)
    if len(new) < step:
        new = np.arange(len(units))
    most = min(parts - 1, len(new) // step)
    held = step * min(max(round(share * parts), 1), most) if share else 0
    mask = np.zeros(len(units), bool)
    mask[new[_spread(len(new), held, seed)]] = True
    fitted = units[~mask]
    return fitted[: len(fitted) // step * step], units[mask]


def _spread(total: int, count: int, seed: int) -> np.ndarray:
    """`count` of the numbers below `total`, ascending: one at random from each of `count` equal stretches."""
    edges = np.arange(count + 1) * total // max(count, 1)
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


@dataclass(frozen=True)
class Samples:
    """The calibration samples of a run: how many were fitted and how many held out; `labels` is the name of
    the label array, `memory` the budget in bytes, `batch` the most rows of a batch that it and the model
    allowed."""

    description: str
    synthetic: bool
    fitted: int
    held_out: int
    labels: str | None
    memory: int
    batch: int
