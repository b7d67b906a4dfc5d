"""Populations of an output: elements of one scale, each measured in units of its own.

One tensor can hold numbers of two kinds: logits beside a fill of -1e9 where a mask applies, pixels beside
probabilities. A spread over all of them is that of the larger kind, and an error of the smaller one vanishes
in it. So elements whose scale dwarfs the rest are a population by themselves. There are two ways to dwarf:

- By value: everything else is at least `GAP` times smaller. From `FILL` on alone, because below it a large
  value beside tiny ones is as likely the winner of a softmax, a log-probability or a white pixel.
- By place: the slices of one axis (channels, classes, columns) fall into groups, so that the typical element
  (power mean of exponent 1/2) of every slice of the upper group is at least `GAP` times the root mean square
  of every slice of the lower one, and so are their deviations. From 1 on alone, because below it they are as
  likely probabilities of rare and of frequent classes. A slice that is often zero dwarfs nothing, so that a
  dead channel of a Relu stays with the others, and a column with an offset stays with those that vary as
  much.

The partition depends on the reference alone, and on all of its batches, whatever their order: values are
summed in zones of five octaves, and zones without a gap between them are put together at the end. What is
kept are sums over the slices of each axis and the mean of each feature: memory does not grow with the
samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

GAP = 32.0
"""How many times the rest a population of its own is at least."""

FILL = 512.0
"""The least magnitude of elements that dwarf the rest by their value."""

_OCTAVES = 5  # of a zone; 2 ** 5 is GAP
_FIRST = 10  # exponent, as frexp gives it, of FILL
_HUGE = 500  # exponent from which squares would overflow
_HUGE_ZONE = 1000
_LONGEST = 1 << 16  # slices of an axis; a longer one counts places, not kinds
_PROBABILITY = 1.0  # the least typical magnitude of slices that dwarf others
_FEW = 0.4  # share of zeros up to which a slice has a typical magnitude: of a Relu half are

_COUNT, _SUM, _SQUARE, _ROOTS, _ZEROS, _INNER = range(6)  # of square roots of magnitudes; about feature means
_WHOLE = -1  # stands for the one slice that is everything


@dataclass(frozen=True)
class Population:
    """Sums over the elements of one scale.

    Attributes:
        elements: how many.
        square: of their magnitudes.
        deviation: of squares from the mean over the samples, or over all elements.
        peak: the largest magnitude.
        squares, peaks: of the distances, for each stream (streams,).
        seen: elements that each stream has distances of (streams,).
        unit: what all of these are in: 1, or more where squares would overflow.
        where: the slices, in words; empty where it is not by place.
    """

    elements: int
    square: float
    deviation: float
    peak: float
    squares: np.ndarray
    peaks: np.ndarray
    seen: np.ndarray
    unit: float
    where: str = ""


class Populations:
    """Streaming sums of one output, and of distances from it in several streams."""

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._zones: dict[int, _Zone] = {}
        self._axes: dict[int, int] | None = None  # sizes that all batches have in common
        self._row_shape: tuple[int, ...] | None = None
        self._by_row = True
        self._rows = 0

    def place(self, a: np.ndarray, finite: np.ndarray | None, samples: int) -> Placed:
        """Take in one batch of the reference; what it returns says where its elements belong.

        Args:
            a: the values, finite.
            finite: which of them count; None for all.
            samples: the batch's number of samples.
        """
        by_row = a.ndim > 0 and a.shape[0] == samples
        self._by_row &= by_row and self._row_shape in (None, a.shape[1:])
        self._row_shape, self._rows = a.shape[1:], self._rows + samples
        dims = enumerate(a.shape)
        sizes = {axis: size for axis, size in dims if 1 < size <= _LONGEST and (axis or not by_row)}
        same = sizes if self._axes is None else dict(self._axes.items() & sizes.items())
        self._axes = {_WHOLE: 1} | same
        parts = []
        for number, mask in _zones(a, finite):
            unit = 2.0**600 if number == _HUGE_ZONE else 1.0
            zone = self._zones.setdefault(number, _Zone(unit))
            counts = zone.add(a, mask, by_row, self._by_row, self._axes, self._streams)
            parts.append((zone, mask, counts))
        return Placed(tuple(parts), by_row, tuple(self._axes))

    def result(self, noise: float) -> list[Population]:
        """The populations, the one of the smallest scale first; none where there are no elements.

        Args:
            noise: slices whose root mean square is no larger hold no numbers of a scale of their own.
        """
        clusters: list[_Zone] = []
        for _, zone in sorted(self._zones.items()):
            below = clusters[-1] if clusters else None
            if below and below.unit == zone.unit and (not below.high or zone.low < GAP * below.high):
                below.merge(zone, self._by_row)
            else:
                clusters.append(zone)
        found = (part for zone in clusters for part in self._by_place(zone, noise))
        return [part for part in found if part.elements]

    def _by_place(self, zone: _Zone, noise: float) -> list[Population]:
        """The populations of elements that no gap of values divides."""
        deviates = self._by_row and self._rows > 1
        best = [zone.slices[_WHOLE].population(np.array([0]), zone.unit, deviates)]
        widest = 0.0
        for axis in (axis for axis in self._axes or {} if axis != _WHOLE and axis in zone.slices):
            slices = zone.slices[axis]
            found: list[Population] = []
            numbers: list[np.ndarray] = []
            for group in _groups(slices, noise):
                made = slices.population(group, zone.unit, deviates, _named(axis, group))
                if found and _ratio(found[-1], made) < GAP:
                    numbers[-1] = np.sort(np.concatenate([numbers[-1], group]))
                    found[-1] = slices.population(numbers[-1], zone.unit, deviates, _named(axis, numbers[-1]))
                else:
                    found.append(made)
                    numbers.append(group)
            ratio = max((_ratio(*pair) for pair in pairwise(found)), default=0.0)
            if ratio > widest:
                best, widest = found, ratio
        return best


@dataclass(frozen=True)
class Placed:
    """Where the elements of one batch belong; takes in their distances."""

    parts: tuple[tuple[_Zone, np.ndarray | None, dict[int, np.ndarray]], ...]
    by_row: bool
    axes: tuple[int, ...]

    def add(self, stream: int, distance: np.ndarray) -> None:
        """Take in how far another value of this batch is off.

        Args:
            stream: the number of the other value's stream.
            distance: from the reference, element by element; 0 where it does not count.
        """
        for zone, mask, counts in self.parts:
            own = distance if mask is None else np.where(mask, distance, 0.0)
            own = own if zone.unit == 1 else own / zone.unit
            square = _rows(own * own, self.by_row)
            peak = own.max(axis=0, keepdims=True, initial=0.0) if self.by_row else own
            for axis in self.axes:
                slices = zone.slices[axis]
                slices.seen[stream] += counts[axis]
                slices.squares[stream] += _over(square, axis)
                np.maximum(slices.peaks[stream], _largest(peak, axis), out=slices.peaks[stream])


class _Slices:
    """Sums over each slice of one axis; the fields of `sums` are `_COUNT` and those after it."""

    def __init__(self, size: int, streams: int) -> None:
        self.sums = np.zeros((6, size))
        self.peak = np.zeros(size)
        self.seen, self.squares, self.peaks = np.zeros((3, streams, size))

    def merge(self, other: _Slices) -> None:
        self.sums += other.sums
        self.seen += other.seen
        self.squares += other.squares
        np.maximum(self.peak, other.peak, out=self.peak)
        np.maximum(self.peaks, other.peaks, out=self.peaks)

    def population(self, chosen: np.ndarray, unit: float, by_row: bool, where: str = "") -> Population:
        sums = self.sums[:, chosen].sum(axis=1)
        mean = float(sums[_SUM]) ** 2 / max(float(sums[_COUNT]), 1.0)
        return Population(
            int(sums[_COUNT]),
            float(sums[_SQUARE]),
            float(sums[_INNER]) if by_row else max(float(sums[_SQUARE]) - mean, 0.0),
            float(self.peak[chosen].max(initial=0.0)),
            self.squares[:, chosen].sum(axis=1),
            self.peaks[:, chosen].max(axis=1, initial=0.0),
            self.seen[:, chosen].sum(axis=1),
            unit,
            where,
        )


class _Zone:
    """Sums over elements within a few octaves, by the slices of each axis, and the means of features."""

    def __init__(self, unit: float) -> None:
        self.unit = unit
        self.low, self.high = np.inf, 0.0
        self.slices: dict[int, _Slices] = {}
        self.counts: np.ndarray | float = 0.0
        self.means: np.ndarray | float = 0.0

    def add(
        self,
        a: np.ndarray,
        mask: np.ndarray | None,
        by_row: bool,
        features: bool,
        axes: dict[int, int],
        streams: int,
    ) -> dict[int, np.ndarray]:
        """Take in the elements of one batch that `mask` chooses; how many they are in each slice, by axis.

        Args:
            a: the values.
            mask: which of them are the zone's; None for all.
            by_row: whether the first axis is that of the samples.
            features: whether it was in all batches, so that each element of a row has a mean.
            axes: those whose slices are summed, with their sizes.
            streams: how many there are.
        """
        x = a if mask is None else np.where(mask, a, 0.0)
        x = x if self.unit == 1 else x / self.unit
        size = np.abs(x)
        self.high = max(self.high, float(size.max(initial=0.0)))
        self.low = min(self.low, float(size.min(initial=np.inf, where=True if mask is None else mask)))
        zeros = size == 0 if mask is None else mask & (size == 0)
        total = _rows(x, by_row)
        count = np.full(total.shape, len(a) if by_row else 1.0) if mask is None else _rows(mask, by_row)
        inner = np.zeros_like(total)
        if features:
            mean = total / np.maximum(count, 1)
            apart = x - mean if mask is None else np.where(mask, x - mean, 0.0)
            inner = _rows(apart * apart, True) + self._join(count, mean)
        roots = _rows(np.sqrt(size), by_row)
        fields = np.stack([count, total, _rows(x * x, by_row), roots, _rows(zeros, by_row), inner])
        peak = size.max(axis=0, keepdims=True, initial=0.0) if by_row else size
        counts = {}
        for axis, length in axes.items():
            slices = self.slices.setdefault(axis, _Slices(length, streams))
            sums = fields.sum(axis=_others(fields.ndim, axis + 1, 1)).reshape(len(fields), -1)
            slices.sums += sums
            np.maximum(slices.peak, _largest(peak, axis), out=slices.peak)
            counts[axis] = sums[_COUNT]
        return counts

    def _join(self, counts: np.ndarray | float, means: np.ndarray | float) -> np.ndarray:
        """Take in counts and means of features; what the distance of the means adds to the squared deviations
        (Chan, Golub, LeVeque 1983, equation 2.1)."""
        total = np.maximum(self.counts + counts, 1)
        apart = means - self.means
        between = np.asarray(apart * apart * self.counts * counts / total)
        self.means = self.means + apart * counts / total
        self.counts = self.counts + counts
        return between

    def merge(self, other: _Zone, features: bool) -> None:
        """Take in another zone of the same batches; `features` as in `add`."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        between = self._join(other.counts, other.means) if features else np.zeros(())
        for axis in list(self.slices):
            if axis not in other.slices:  # the axis was dropped before the other zone was seen
                del self.slices[axis]
                continue
            self.slices[axis].merge(other.slices[axis])
            if between.ndim:
                self.slices[axis].sums[_INNER] += _over(between, axis)


def _zones(a: np.ndarray, finite: np.ndarray | None) -> list[tuple[int, np.ndarray | None]]:
    """The zones of a batch by number, each with the mask of its elements; None where those are all."""
    if max(a.max(initial=0.0), -a.min(initial=0.0)) < FILL:
        return [(0, finite)]
    exponents = np.frexp(a)[1]
    numbers = np.maximum((exponents - _FIRST) // _OCTAVES + 1, 0)
    numbers[exponents > _HUGE] = _HUGE_ZONE
    if finite is not None:
        numbers[~finite] = -1
    found = [int(number) for number in np.unique(numbers) if number >= 0]
    if len(found) == 1 and finite is None:
        return [(found[0], None)]
    return [(number, numbers == number) for number in found]


def _rows(array: np.ndarray, by_row: bool) -> np.ndarray:
    """The sum over the samples, in an axis of size 1, where there is an axis of samples."""
    return np.asarray(array.sum(axis=0, keepdims=True)) if by_row else array


def _others(dims: int, axis: int, first: int = 0) -> tuple[int, ...]:
    """The axes from the first on, but for one."""
    return tuple(at for at in range(first, dims) if at != axis)


def _over(array: np.ndarray, axis: int) -> np.ndarray:
    """Sums over all axes but one."""
    return np.atleast_1d(array.sum(axis=_others(array.ndim, axis)))


def _largest(array: np.ndarray, axis: int) -> np.ndarray:
    """The largest over all axes but one, at least 0."""
    return np.atleast_1d(array.max(axis=_others(array.ndim, axis), initial=0.0))


def _groups(slices: _Slices, noise: float) -> list[np.ndarray]:
    """The slices in groups that dwarf each other, the smallest scale first; those of no more than noise are
    with the first."""
    sums = slices.sums
    seen = np.flatnonzero(sums[_SQUARE] > noise**2 * sums[_COUNT])
    if len(seen) < 2:
        return [np.arange(sums.shape[1])]
    size = np.sqrt(sums[_SQUARE, seen] / sums[_COUNT, seen])
    typical = (sums[_ROOTS, seen] / sums[_COUNT, seen]) ** 2
    typical[sums[_ZEROS, seen] > _FEW * sums[_COUNT, seen]] = 0.0
    order = np.argsort(size, kind="stable")
    least = np.minimum.accumulate(typical[order][::-1])[::-1]
    cuts = np.flatnonzero((least[1:] >= GAP * size[order][:-1]) & (least[1:] >= _PROBABILITY)) + 1
    groups = np.split(seen[order], cuts)
    rest = np.setdiff1d(np.arange(sums.shape[1]), seen)
    groups[0] = np.concatenate([groups[0], rest])
    return [np.sort(group) for group in groups]


def _ratio(lower: Population, upper: Population) -> float:
    """The deviation of an element of one population in units of that of the other."""
    above, below = (part.deviation / max(part.elements, 1) for part in (upper, lower))
    return math.sqrt(above / below) if below else math.inf


def _named(axis: int, numbers: np.ndarray) -> str:
    """Slices of an axis, ascending, as ranges: "axis 1: 0-3, 7"; of many the first few."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    said = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"axis {axis}: " + ", ".join(said[:4]) + (", ..." if len(said) > 4 else "")
