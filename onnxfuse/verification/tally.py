"""Sums over batches: how far other values of each output are from those of a reference, scale by scale.

Outputs need not be tensors: sequences and maps are tallied by element. Infinities and NaN are no numbers:
they must be where the reference has them, and nothing else is asked of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from onnxfuse.verification.populations import Placed, Population, Populations


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


def spacing(dtype: np.dtype) -> float:
    """Spacing of floats at 1; eight bits of mantissa are taken for types that NumPy does not know."""
    known = dtype.kind in "fc" and dtype.itemsize > 1  # float8e5m2 is of kind "f", too
    return float(np.finfo(dtype).eps) if known else 2.0**-7


class Tally:
    """Streaming differences of other values of one output from the reference, a stream for each other.

    Attributes:
        count, unequal: elements, and of the first stream those that differ, where they are not
            floating-point.
        exact: whether they are not: such elements must be equal.
        nonfinite: elements that are infinite or NaN in the reference.
        eps: spacing of the type's floats at 1.
        problem: a difference of kind (type, shape, NaN, infinity) of the first stream, in words.
    """

    def __init__(self, streams: int) -> None:
        self.count = 0
        self.unequal = 0
        self.exact = False
        self.nonfinite = 0
        self.eps = 0.0
        self.problem: str | None = None
        self._populations = Populations(streams)
        self._batch: tuple[np.ndarray, np.ndarray, np.ndarray | None, Placed] | None = None

    def begin(self, a: np.ndarray, samples: int) -> None:
        """Take in one batch of the reference, of so many samples."""
        self.count += a.size
        self.exact = not is_float(a)
        self._batch = None
        if self.exact:
            return
        self.eps = spacing(a.dtype)
        wide = _real(widened(a))
        finite = np.isfinite(wide)
        marked = None if finite.all() else finite
        if marked is not None:
            self.nonfinite += int(np.count_nonzero(~finite))
        clean = wide if marked is None else np.where(finite, wide, 0.0)
        self._batch = wide, clean, marked, self._populations.place(clean, marked, samples)

    def add(self, stream: int, name: str, a: np.ndarray, b: np.ndarray, labels: tuple[str, str]) -> None:
        """Take in another value of the batch that was begun.

        Args:
            stream: its number.
            name: of the output.
            a, b: the reference and the other value.
            labels: what messages call the two.
        """
        problem = difference_of_kind(name, a, b, labels)
        if self._batch is None:
            if stream == 0 and not problem:
                self.unequal += int(np.count_nonzero(a != b))
        elif not problem:
            problem = self._distances(stream, name, _real(widened(b)), labels)
        if stream == 0:
            self.problem = self.problem or problem

    def _distances(self, stream: int, name: str, b: np.ndarray, labels: tuple[str, str]) -> str | None:
        """Take in the distances where both are finite; what there is to say of where they are not."""
        assert self._batch is not None
        wide, clean, marked, placed = self._batch
        finite = np.isfinite(b)
        if marked is None and finite.all():
            with np.errstate(over="ignore"):
                placed.add(stream, np.abs(clean - b))
            return None
        both = finite if marked is None else finite & marked
        with np.errstate(over="ignore"):
            placed.add(stream, np.abs(np.where(both, clean, 0.0) - np.where(both, b, 0.0)))
        wrong = ~both & ~((wide == b) | (np.isnan(wide) & np.isnan(b)))
        if not wrong.any():
            return None
        owner, other, own = (*labels, wide) if np.isfinite(b[wrong]).all() else (*labels[::-1], b)
        kind = "NaN" if np.isnan(own[wrong]).any() else "infinity"
        return (
            f"'{name}' of {owner} has {kind} in {np.count_nonzero(wrong)} of {wrong.size} elements where "
            f"{other} has something else"
        )

    def populations(self) -> list[Population]:
        """Its elements by their scale; none where they must be equal."""
        return [] if self.exact else self._populations.result(self.eps)


def _real(array: np.ndarray) -> np.ndarray:
    """Complex numbers as pairs, on an axis of their own."""
    return np.stack([array.real, array.imag], axis=-1) if array.dtype.kind == "c" else array


def difference_of_kind(name: str, a: np.ndarray, b: np.ndarray, labels: tuple[str, str]) -> str | None:
    """A difference of type or shape between two arrays, in words; None without one.

    Args:
        name: of the output.
        a, b: the arrays.
        labels: what the message calls the two.
    """
    if a.dtype != b.dtype:
        return f"'{name}' is {a.dtype} in {labels[0]} and {b.dtype} in {labels[1]}"
    if a.shape != b.shape:
        return f"'{name}' has shape {list(a.shape)} in {labels[0]} and {list(b.shape)} in {labels[1]}"
    return None


def mismatch(name: str, a: np.ndarray, b: np.ndarray, labels: tuple[str, str]) -> str | None:
    """What keeps two arrays from being subtracted (type, shape, NaN, infinity), in words; None where nothing
    does. Arguments as in `difference_of_kind`."""
    if found := difference_of_kind(name, a, b, labels):
        return found
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
    """Streaming differences of other values from a reference, output by output."""

    def __init__(self, labels: tuple[str, str], streams: int = 1) -> None:
        """
        Args:
            labels: what messages call the reference and the first other.
            streams: how many others there are.
        """
        self.tallies: dict[str, Tally] = {}
        self.labels = labels
        self._streams = streams

    def add(self, a: Mapping[str, Any], others: Iterable[Mapping[str, Any]], samples: int) -> None:
        """Take in one batch.

        Args:
            a: outputs of the reference.
            others: outputs of each stream, one after the other; they may lack some.
            samples: the batch's number of samples.
        """
        ours = {name: dict(named_arrays(name, value)) for name, value in a.items()}
        for leaves in ours.values():
            for leaf, array in leaves.items():
                self._tally(leaf).begin(array, samples)
        for stream, other in enumerate(others):
            for name, value in other.items():
                left, right = ours[name], dict(named_arrays(name, value))
                for leaf in left.keys() & right.keys():
                    self._tally(leaf).add(stream, leaf, left[leaf], right[leaf], self.labels)
                if stream == 0:
                    self._lacking(left, right)

    def _lacking(self, left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
        for leaf in left.keys() ^ right.keys():
            owner, other = self.labels if leaf in left else self.labels[::-1]
            self._tally(leaf).problem = f"'{leaf}' is in {owner} and not in {other}"

    def _tally(self, leaf: str) -> Tally:
        return self.tallies.setdefault(leaf, Tally(self._streams))


def quotient(value: float, unit: float) -> float:
    """`value` in units of `unit`; of a unit of 0, infinity or 0."""
    return value / unit if unit > 0 else (np.inf if value > 0 else 0.0)
