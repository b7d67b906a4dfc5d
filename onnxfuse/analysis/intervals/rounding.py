"""Bounds that hold in floating point: each step widened by what rounding can add.

`rules` derives how much that is. The rules of single operators compute with bounds through these functions,
and never round by themselves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from onnxfuse.analysis.intervals import interval
from onnxfuse.analysis.intervals.interval import FORMATS, Format, Interval, constant
from onnxfuse.ir.shapes import TensorInfo


def unbounded(info: TensorInfo) -> Interval:
    """The bounds that the type alone gives."""
    rank = 0 if info.shape is None else len(info.shape)
    kind = "" if info.dtype is None else info.dtype.kind
    if kind == "b":
        return constant(0, 1, rank)
    if info.dtype is not None and kind in ("i", "u"):
        return constant(float(np.iinfo(info.dtype).min), float(np.iinfo(info.dtype).max), rank)
    return constant(-math.inf, math.inf, rank)


def fitted(found: Interval | None, info: TensorInfo, selecting: bool) -> Interval:
    """Bounds as a tensor of a type and shape can have them.

    Args:
        found: what a rule found, None for nothing.
        info: the tensor.
        selecting: whether its operator computes no new integers, which may wrap around.
    """
    everything = unbounded(info)
    form = None if info.dtype is None else FORMATS.get(info.dtype.name)
    integral = info.dtype is not None and info.dtype.kind in "biu" and selecting
    if found is None or 0 in found.shape or not (form or integral):
        return everything
    found = clean(found.low, found.high)
    if form is not None:
        low = np.where(found.low < -form.largest, -math.inf, found.low)
        found = Interval(low, np.where(found.high > form.largest, math.inf, found.high))
    elif found.low.min() < everything.low.min() or found.high.max() > everything.high.max():
        return everything
    if info.shape is None or found.low.ndim > len(info.shape):
        return found.hull().union(constant(math.inf, -math.inf, len(info.shape or ())))
    missing = (1,) * (len(info.shape) - found.low.ndim)
    found = found.map(lambda bound: bound.reshape((*missing, *bound.shape)))
    sizes = zip(found.shape, info.shape, strict=True)
    wrong = [i for i, (n, dim) in enumerate(sizes) if n != 1 and isinstance(dim, int) and n != dim]
    return found.hull(range(len(info.shape)) if found.low.size > interval.MOST_INDICES else wrong)


def clean(low: np.ndarray, high: np.ndarray) -> Interval:
    """The interval with infinity in place of a bound that is no number."""
    return Interval(np.where(np.isnan(low), -math.inf, low), np.where(np.isnan(high), math.inf, high))


def _up(high: np.ndarray, form: Format) -> np.ndarray:
    """Bound of one operation's rounded result, from that of its exact result."""
    whole = np.frexp(high)[0] * (2 / form.eps) % 1 == 0
    wide = high + form.eps * np.abs(high) + form.tiny
    wide = np.where(high <= 0, np.minimum(wide, 0), wide)
    return np.where(np.isinf(high) | (whole & (np.abs(high) >= form.normal)), high, wide)


def rounded_bounds(low: np.ndarray, high: np.ndarray, form: Format) -> Interval:
    """Bounds of one operation's rounded result.

    Args:
        low, high: bounds of its exact result.
        form: the type that it is rounded to.
    """
    found = clean(low, high)
    return Interval(-_up(-found.low, form), _up(found.high, form))


def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product, 0 where either factor is 0, also of infinity."""
    return np.where((a == 0) | (b == 0), 0, a * b)


def corners(function: Callable[[Any, Any], np.ndarray], a: Interval, b: Interval, form: Format) -> Interval:
    """Bounds of a function of two operands that is monotone in each, from its values at the four corners.

    Args:
        function: of two arrays.
        a, b: the operands.
        form: the type that the result is rounded to.
    """
    values = [function(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    return rounded_bounds(functools.reduce(np.minimum, values), functools.reduce(np.maximum, values), form)


def _sum_up(products: np.ndarray, bias: np.ndarray, form: Format, extra: int) -> np.ndarray:
    """The largest computed sum over the last axis (see `rules`); `extra` roundings make a product."""
    total = products.sum(-1) + bias
    size = np.abs(products).sum(-1) + np.abs(bias)
    nonzero = np.count_nonzero(products, -1)
    steps = np.where(nonzero == 0, 0, nonzero + (bias != 0) - 1 + extra)
    exact = steps == 0
    if extra <= 1:
        quantum = np.exp2(np.ceil(np.log2(size))) * form.eps / 2
        parts = np.concatenate([products, bias[..., None]], -1) / quantum[..., None]
        exact |= (parts == np.rint(parts)).all(-1) & (quantum >= form.normal)
    high = np.where(exact, total, total + steps * (2 * form.eps * size + form.tiny))
    high = np.where((products <= 0).all(-1) & (bias <= 0), np.fmin(high, 0), high)
    return np.where(np.isnan(high), math.inf, high)


def sums(products: Interval, bias: np.ndarray, form: Format, extra: int) -> Interval:
    """Bounds of the computed sums over the last axis.

    Args:
        products: bounds of the terms.
        bias: one more term of each sum.
        form: the type in which it is summed.
        extra: roundings that make a product.
    """
    low = -_sum_up(-products.low, -bias, form, extra)
    return Interval(low, _sum_up(products.high, bias, form, extra))


def scaled_by(weight: np.ndarray, x: Interval) -> Interval:
    """Exact bounds of products with weights."""
    ends = times(weight, x.low), times(weight, x.high)
    return Interval(np.minimum(*ends), np.maximum(*ends))


def rounded_mean(x: Interval, axes: tuple[int, ...], count: int, form: Format) -> Interval:
    """Bounds of a computed mean.

    Args:
        x: bounds of the values.
        axes: along which the bounds vary; they keep size 1.
        count: the number of values.
        form: the type in which they are summed.
    """

    def upper(high: np.ndarray) -> np.ndarray:
        size = np.abs(high).mean(axes, keepdims=True)
        mean = high.mean(axes, keepdims=True) + 2 * form.eps * (count + 1) * size + form.tiny
        return np.where((high <= 0).all(axes, keepdims=True), np.fmin(mean, 0), mean)

    return clean(-upper(-x.low), upper(x.high))
