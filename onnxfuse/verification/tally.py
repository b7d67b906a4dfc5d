"""Sums over batches: differences of outputs between two runs, and their deviations in one.

Outputs need not be tensors: sequences and maps are tallied by element.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


def named_arrays(name: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays in an output: itself, or the elements of a sequence, a map or an optional."""
    if value is None:
        return
    if isinstance(value, Mapping):
        for key in sorted(value):
            yield from named_arrays(f"{name}[{key!r}]", value[key])
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from named_arrays(f"{name}[{index}]", item)
    else:
        yield name, np.asarray(value)


def is_float(array: np.ndarray) -> bool:
    """Floating-point or complex; `V` are the small floats that NumPy itself does not know (bfloat16,
    float8)."""
    return array.dtype.kind in "fcV"


def widened(array: np.ndarray) -> np.ndarray:
    """The array in float64, or complex128."""
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


class Deviation:
    """Streaming deviation of an output from its mean over the samples (axis 0), or over all elements."""

    def __init__(self) -> None:
        self.elements = 0
        self.rows = 0
        self.square = 0.0
        self._total: np.ndarray | None = None  # per element of a row, None once rows differ in shape
        self._sum: complex = 0.0
        self._by_row = True

    def add(self, x: np.ndarray, samples: int) -> None:
        self.elements += x.size
        self.square += float(np.vdot(x, x).real)
        self._sum += complex(x.sum())
        self._by_row &= x.ndim > 0 and x.shape[0] == samples
        self._by_row &= self._total is None or (self._by_row and self._total.shape == x.shape[1:])
        if self._by_row:
            self._total = x.sum(axis=0) + (0 if self._total is None else self._total)
            self.rows += samples

    @property
    def scale(self) -> float:
        """Root mean square deviation; the root mean square itself where there is no deviation."""
        if self.elements == 0:
            return 0.0
        if self._by_row and self.rows > 1 and self._total is not None:
            mean = float(np.vdot(self._total, self._total).real) / self.rows
        else:
            mean = abs(self._sum) ** 2 / self.elements
        deviation = self.square - mean
        return float(np.sqrt((deviation if deviation > 1e-12 * self.square else self.square) / self.elements))


class Tally:
    """Streaming difference of one output between two runs, a and b."""

    def __init__(self) -> None:
        self.count = 0
        self.square = 0.0
        self.peak = 0.0
        self.unequal = 0
        self.exact = False  # not floating-point: must be equal
        self.problem: str | None = None

    def add(self, name: str, a: np.ndarray, b: np.ndarray, labels: tuple[str, str]) -> None:
        """Take in one batch.

        Args:
            name: of the output.
            a, b: its value in both runs.
            labels: what messages call the two.
        """
        self.problem = self.problem or mismatch(name, a, b, labels)
        if self.problem:
            return
        self.count += a.size
        if not is_float(a):
            self.exact = True
            self.unequal += int(np.count_nonzero(a != b))
        elif a.size:
            distance = np.abs(widened(a) - widened(b))
            self.square += float(np.vdot(distance, distance))
            self.peak = max(self.peak, float(distance.max()))

    @property
    def rms(self) -> float:
        return float(np.sqrt(self.square / self.count)) if self.count else 0.0


def mismatch(name: str, a: np.ndarray, b: np.ndarray, labels: tuple[str, str]) -> str | None:
    """A difference of kind between two arrays (type, shape, NaN, infinity), in words; None without one.

    Args:
        name: of the output.
        a, b: the arrays.
        labels: what the message calls the two.
    """
    if a.dtype != b.dtype:
        return f"'{name}' is {a.dtype} in {labels[0]} and {b.dtype} in {labels[1]}"
    if a.shape != b.shape:
        return f"'{name}' has shape {list(a.shape)} in {labels[0]} and {list(b.shape)} in {labels[1]}"
    if is_float(a):
        for array, label in ((a, labels[0]), (b, labels[1])):
            finite = np.isfinite(widened(array))
            if not finite.all():
                kind = "NaN" if np.isnan(widened(array)).any() else "infinity"
                return (
                    f"'{name}' of {label} has {kind} in {np.count_nonzero(~finite)} of {array.size} elements"
                )
    return None


class Differences:
    """Streaming differences of all outputs between two runs."""

    def __init__(self, labels: tuple[str, str]) -> None:
        self.tallies: dict[str, Tally] = {}
        self.labels = labels

    def add(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
        for name, value in a.items():
            left, right = dict(named_arrays(name, value)), dict(named_arrays(name, b[name]))
            for leaf in left.keys() ^ right.keys():
                owner, other = self.labels if leaf in left else self.labels[::-1]
                tally = self.tallies.setdefault(leaf, Tally())
                tally.problem = f"'{leaf}' is in {owner} and not in {other}"
            for leaf in left.keys() & right.keys():
                self.tallies.setdefault(leaf, Tally()).add(leaf, left[leaf], right[leaf], self.labels)


def add_spreads(spreads: dict[str, Deviation], outputs: Mapping[str, Any], rows: int) -> None:
    """Take one batch of outputs into their deviations.

    Args:
        spreads: by output; new ones are added.
        outputs: the batch's.
        rows: its number of samples.
    """
    for name, value in outputs.items():
        for leaf, array in named_arrays(name, value):
            if is_float(array):
                spreads.setdefault(leaf, Deviation()).add(widened(array), rows)


def quotient(value: float, unit: float) -> float:
    """`value` in units of `unit`; of a unit of 0, infinity or 0."""
    return value / unit if unit > 0 else (np.inf if value > 0 else 0.0)
