"""Intervals of arrays: two bounds for each element, in the type that a tensor has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from onnxfuse.ir.shapes import AxisSize

MOST_INDICES = 1 << 18
"""The most indices that bounds of one tensor are kept for; a larger tensor gets one pair for all."""

POSITIONS = 1 << 22  # values that a mean over an unknown number of positions is taken to add up
CURVE, DIP = 16, 128  # roundings of a curve's approximation, and of a product with one

Dims = tuple[AxisSize, ...]


class Format(NamedTuple):
    """Numbers of a floating type: the distance of 1 to the next one, the least normal one, the error of an
    operation that underflows, the largest one."""

    eps: float
    normal: float
    tiny: float
    largest: float


FORMATS = {
    "float16": Format(2.0**-10, 2.0**-14, 2.0**-24, 65504.0),
    "bfloat16": Format(2.0**-7, 2.0**-126, 2.0**-126, float.fromhex("0x1.fep127")),
    "float32": Format(2.0**-23, 2.0**-126, 2.0**-126, float(np.finfo(np.float32).max)),
    "float64": Format(2.0**-52, 2.0**-1022, 2.0**-1022, float(np.finfo(np.float64).max)),
}


@dataclass(frozen=True, eq=False)
class Interval:
    """`low <= tensor <= high`: float64 arrays of one shape, which broadcasts against the tensor's.

    The rank is the tensor's (0 where that is unknown); an axis has size 1, if the bound holds for all its
    indices, or the tensor's own size.
    """

    low: np.ndarray
    high: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of both arrays."""
        return self.low.shape

    def hull(self, axes: Iterable[int] | None = None) -> Interval:
        """One pair for all indices of some axes, which keep size 1; by default one for all, of rank 0."""
        if axes is None:
            return Interval(np.asarray(self.low.min()), np.asarray(self.high.max()))
        over = tuple(axes)
        return Interval(self.low.min(over, keepdims=True), self.high.max(over, keepdims=True))

    def union(self, other: Interval) -> Interval:
        """The least interval around both."""
        return Interval(np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Interval:
        """A function that does not decrease, and rounds nothing, applied to both."""
        return Interval(function(self.low), function(self.high))

    def zeros(self, axis: int, size: int) -> np.ndarray:
        """A mask (size,) of the indices of an axis that are 0 whatever is fed."""
        if not self.shape:
            return np.full(size, bool(self.low == 0 == self.high))
        zero = (self.low == 0) & (self.high == 0)
        return np.broadcast_to(np.moveaxis(zero, axis, 0).reshape(zero.shape[axis], -1).all(1), (size,))


def constant(low: float, high: float, rank: int = 0) -> Interval:
    """The same two bounds for all elements of a tensor.

    Args:
        low, high: the bounds.
        rank: of the tensor, 0 where it is unknown.
    """
    return Interval(np.full((1,) * rank, low, np.float64), np.full((1,) * rank, high, np.float64))


UNBOUNDED = constant(-math.inf, math.inf)
ZERO = constant(0, 0)
