"""Few values for many numbers: k-means on a line.

Sorted, a cluster is a run, so what a step of Lloyd's algorithm needs are the places where the runs end (a
binary search for each center) and differences of running sums: its cost does not depend on how many numbers
there are, and memory never on centers times numbers.

Where it ends depends on where it starts. Many centers are best as dense as the cube root of the numbers'
density (Panter and Dite 1951), which gives large weights, few as they are, centers of their own; Han et al.
(2016, section 3.2) spread them evenly over the range to that end, which ends in worse optima. A center that
no number is nearest to goes into the run with the largest error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxfuse.numerics.affine import Array

LLOYD_STEPS = 1000

STARTS = 16
"""Stretches of the line, for each center, by which the density is told."""


def kmeans(numbers: npt.NDArray[Any], count: int) -> Array:
    """At most `count` centers, ascending, float64: those numbers themselves where they are no more.

    Deterministic: it depends on the numbers, not on their order.
    """
    points = np.sort(numbers.reshape(-1).astype(np.float64))
    distinct = points[np.concatenate([[True], points[1:] != points[:-1]])] if len(points) else points
    if len(distinct) <= count:
        return distinct
    shifted = points - points.mean()  # running sums of what lies far from 0 lose digits
    sums = np.concatenate([[0.0], np.cumsum(shifted)])
    squares = np.concatenate([[0.0], np.cumsum(shifted**2)])
    centers = _start(shifted, count)
    for _ in range(LLOYD_STEPS):
        ends = _ends(shifted, centers)
        sizes = np.diff(ends)
        filled = sizes > 0
        means = np.diff(sums[ends])[filled] / sizes[filled]
        errors = np.diff(squares[ends])[filled] - sizes[filled] * means**2
        moved = np.sort(np.concatenate([means, _splits(shifted, ends, filled, errors, count - len(means))]))
        if len(moved) == len(centers) and np.array_equal(moved, centers):
            break
        centers = moved
    return np.asarray(centers + points.mean())


def _start(points: Array, count: int) -> Array:
    """The first centers: of stretches with equally many points, one of length g has the density 1 / g, so
    g^(2/3) centers."""
    marks = points[np.linspace(0, len(points) - 1, min(len(points), STARTS * count)).astype(np.int64)]
    filled = np.concatenate([[0.0], np.cumsum(np.diff(marks) ** (2 / 3))])
    return np.interp((np.arange(count) + 0.5) / count * filled[-1], filled, marks)


def _ends(points: Array, centers: Array) -> npt.NDArray[np.int64]:
    """The places where the runs nearest to each center begin and, at last, end."""
    middles = (centers[1:] + centers[:-1]) / 2
    inner = np.searchsorted(points, middles, side="right")
    return np.concatenate([[0], inner, [len(points)]]).astype(np.int64)


def _splits(
    points: Array, ends: npt.NDArray[np.int64], filled: npt.NDArray[np.bool_], errors: Array, count: int
) -> Array:
    """A further center in each of the runs with the `count` largest errors: at its last point, which is then
    nearest to nothing else."""
    worst = np.argsort(-errors, kind="stable")[:count]
    worst = worst[errors[worst] > 0]
    return points[ends[1:][filled][worst] - 1]


def nearest(numbers: npt.NDArray[Any], table: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Indices of the nearest entries of an ascending table (m,), in the shape of the numbers."""
    wide = table.astype(np.float64)
    middles = (wide[1:] + wide[:-1]) / 2
    return np.searchsorted(middles, numbers.astype(np.float64), side="left").astype(np.int64)
