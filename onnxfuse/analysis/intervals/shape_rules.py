"""Intervals through operators that move, pick, pool or sum elements.

Bounds are kept by index along the axes that a rule can follow, and joined along the others.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping

import numpy as np

from onnxfuse.analysis.intervals import interval
from onnxfuse.analysis.intervals.interval import POSITIONS, ZERO, Dims, Interval, constant
from onnxfuse.analysis.intervals.node import IntervalNode, IntervalRule, type_info
from onnxfuse.analysis.intervals.rounding import rounded_mean, times
from onnxfuse.ir.shapes import AxisSize


def _filled(site: IntervalNode) -> Interval:
    stored = site.attribute("value")
    value = 0.0 if stored is None else float(stored.item())
    return constant(value, value)


# ---- windows and reductions ------------------------------------------------------------------------------


def _spatial(x: Interval) -> range:
    return range(min(2, x.low.ndim), x.low.ndim)


def _max_pool(site: IntervalNode) -> Interval:
    found = site.at(0).hull(_spatial(site.at(0)))
    dilated = any(d > 1 for d in site.attribute("dilations", ()))
    return Interval(found.low - math.inf, found.high) if dilated and site.padded else found


def _average_pool(site: IntervalNode) -> Interval:
    x = site.at(0).hull(_spatial(site.at(0)))
    dilated = any(d > 1 for d in site.attribute("dilations", ()))
    if site.padded and (site.attribute("count_include_pad", 0) or dilated):
        x = x.union(ZERO)
    return rounded_mean(x, (), math.prod(site.attribute("kernel_shape", ())), site.format)


def _count(site: IntervalNode, axes: Iterable[int]) -> int | None:
    """The number of values along these axes of the first input, None if unknown."""
    dims = site.dims(0)
    sizes = None if dims is None else _static([dims[axis] for axis in axes])
    return None if sizes is None else math.prod(sizes)


def _reduced(site: IntervalNode, x: Interval, axes: tuple[int, ...]) -> Interval:
    count, form = _count(site, axes), site.format
    if site.node.op in ("ReduceMax", "GlobalMaxPool"):
        return x.map(lambda bound: bound.max(axes, keepdims=True))
    if site.node.op == "ReduceMin":
        return x.map(lambda bound: bound.min(axes, keepdims=True))
    mean = rounded_mean(x, axes, count or POSITIONS, form)
    if site.node.op in ("ReduceMean", "GlobalAveragePool"):
        return mean
    many = np.asarray(math.inf if count is None else count)
    total = mean.map(lambda bound: times(bound, many))
    return total if count is not None else total.union(ZERO)


def _global_pool(site: IntervalNode) -> Interval:
    x = site.at(0)
    return _reduced(site, x, tuple(_spatial(x)))


def _reduce(site: IntervalNode) -> Interval | None:
    x = site.at(0)
    rank = x.low.ndim
    axes = site.integers(1, "axes")
    if axes is None and site.has(1):
        return x.hull() if site.node.op in ("ReduceMax", "ReduceMin") else None
    if not axes and site.attribute("noop_with_empty_axes", 0):
        return x
    if type_info(site.shapes, site.node.inputs[0]).shape is None:
        return _reduced(site, x, ())
    over = tuple(sorted({axis % rank for axis in axes})) if axes else tuple(range(rank))
    found = _reduced(site, x, over)
    return found if site.attribute("keepdims", 1) else found.map(lambda bound: bound.squeeze(over))


# ---- moving values ---------------------------------------------------------------------------------------


def _concat(site: IntervalNode) -> Interval:
    parts = [site.at(slot) for slot in range(len(site.node.inputs))]
    rank = parts[0].low.ndim
    if rank == 0 or any(part.low.ndim != rank for part in parts):
        return functools.reduce(Interval.union, [part.hull() for part in parts])
    axis = site.axis("axis", 1, rank)
    sizes = _static([dims[axis] if (dims := site.dims(slot)) else None for slot in range(len(parts))])
    others = np.broadcast_shapes(*(part.hull([axis]).shape for part in parts))
    if sizes is None or sum(sizes) * math.prod(others) > interval.MOST_INDICES:
        return functools.reduce(Interval.union, [part.hull([axis]) for part in parts])
    shapes = [(*others[:axis], size, *others[axis + 1 :]) for size in sizes]

    def joined(bounds: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.broadcast_to(b, s) for b, s in zip(bounds, shapes, strict=True)], axis)

    return Interval(joined(part.low for part in parts), joined(part.high for part in parts))


def _split(site: IntervalNode) -> list[Interval]:
    x, outputs = site.at(0), site.node.outputs
    if x.low.ndim == 0:
        return [x] * len(outputs)
    axis = site.axis("axis", 0, x.low.ndim)
    shapes = [type_info(site.shapes, tensor).shape for tensor in outputs]
    sizes = site.integers(1, "split") or _static([s[axis] if s else None for s in shapes])
    if sizes is None or len(sizes) != len(outputs) or sum(sizes) != x.shape[axis]:
        return [x.hull([axis])] * len(outputs)
    cuts = np.cumsum(sizes)[:-1]
    pairs = zip(np.split(x.low, cuts, axis), np.split(x.high, cuts, axis), strict=True)
    return [Interval(low, high) for low, high in pairs]


def _slice(site: IntervalNode) -> Interval:
    x = site.at(0)
    starts, ends = (site.integers(i, name) for i, name in ((1, "starts"), (2, "ends")))
    axes, steps = site.integers(3, "axes"), site.integers(4, "steps")
    unknown = (axes is None and site.has(3)) or (steps is None and site.has(4))
    if starts is None or ends is None or unknown or x.low.ndim == 0:
        return x.hull()
    window = [slice(None)] * x.low.ndim
    for i, axis in enumerate(axes or range(len(starts))):
        if x.shape[axis] != 1:
            window[axis] = slice(starts[i], ends[i], steps[i] if steps else 1)
    return x.map(lambda bound: bound[tuple(window)])


def _gather(site: IntervalNode) -> Interval:
    x, indices = site.at(0), site.constant(1)
    shape = type_info(site.shapes, site.node.inputs[1]).shape if indices is None else indices.shape
    if x.low.ndim == 0 or shape is None:
        return x.hull()
    axis = site.axis("axis", 0, x.low.ndim)
    if indices is None or x.shape[axis] == 1:
        x, indices = x.hull([axis]), np.zeros((1,) * len(shape), np.int64)
    return x.map(lambda bound: bound.take(indices, axis))


def _pad(site: IntervalNode) -> Interval:
    x, rank = site.at(0), site.at(0).low.ndim
    filled = site.attribute("mode", "constant") == "constant"
    number = float(site.attribute("value", 0.0))
    value = site.at(2).hull() if site.has(2) else constant(number, number)
    pads, axes = site.integers(1, "pads"), site.integers(3, "axes")
    if pads is None or rank == 0 or (axes is None and site.has(3)):
        return x.hull().union(value) if filled else x.hull()
    places = range(rank) if axes is None else [axis % rank for axis in axes]
    sides = [(a, pads[i], pads[i + len(places)]) for i, a in enumerate(places)]
    for axis, before, after in sorted(sides, key=lambda side: side[0] == 1):  # channels are laid out last
        if filled:
            x = _extended(x, axis, (before, after), value, (site.dims(0) or ())[axis])
        elif before or after:
            x = x.hull([axis])
    return x


def _extended(x: Interval, axis: int, sides: tuple[int, int], value: Interval, dim: AxisSize) -> Interval:
    """An axis with `value` before and behind: index by index if it is the channels' or has its own bounds."""
    if sides == (0, 0):
        return x
    size = x.shape[axis] if x.shape[axis] != 1 or axis != 1 else dim
    if not isinstance(size, int) or (size == 1 and axis != 1) or max(sides) + size > interval.MOST_INDICES:
        return x.hull([axis]).union(value)
    first, last = max(-sides[0], 0), size - max(-sides[1], 0)

    def laid(bound: np.ndarray, fill: np.ndarray) -> np.ndarray:
        full = np.broadcast_to(bound, (*bound.shape[:axis], size, *bound.shape[axis + 1 :]))
        kept = full.take(np.arange(first, last), axis)
        widths = [(0, 0)] * axis + [(max(sides[0], 0), max(sides[1], 0))] + [(0, 0)] * (bound.ndim - axis - 1)
        return np.pad(kept, widths, constant_values=float(fill))

    return Interval(laid(x.low, value.low), laid(x.high, value.high))


def _resize(site: IntervalNode) -> Interval | None:
    x, mode = site.at(0), site.attribute("mode", "nearest")
    corner = site.attribute("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    if mode not in ("nearest", "linear", "bilinear") or corner or site.attribute("antialias", 0):
        return None
    before, after = site.dims(0), type_info(site.shapes, site.node.outputs[0]).shape
    if before is None or after is None:
        found = x.hull()
    else:
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a is None or a != b]
        found = x.hull(changed)
    return found if mode == "nearest" else rounded_mean(found, (), 32, site.format)


def _transpose(site: IntervalNode) -> Interval:
    x = site.at(0)
    return x if x.low.ndim == 0 else x.map(lambda bound: bound.transpose(site.attribute("perm", None)))


def _reshape(site: IntervalNode) -> Interval:
    """Reshape, Flatten, Squeeze, Unsqueeze: axes that come through whole keep their bounds; those that are
    joined or cut are written out, if their sizes are known."""
    x, before = site.at(0), site.dims(0)
    after = type_info(site.shapes, site.node.outputs[0]).shape
    if before is None or after is None:
        return x.hull()
    inner: list[int] = []
    outer: list[int] = []
    for old, new in _matched(before, after):
        sizes, fresh = list(x.shape[old]), [1] * len(after[new])
        whole, written = _static(before[old]), _static(after[new])
        if any(n != 1 for n in sizes):
            if len(sizes) == len(fresh) == 1:
                fresh = sizes
            elif whole is not None and written is not None:
                sizes, fresh = whole, written
            else:
                sizes = [1] * len(sizes)
        inner, outer = inner + sizes, outer + fresh
    if math.prod(inner) > interval.MOST_INDICES:
        return x.hull()
    x = x.hull(i for i, n in enumerate(inner) if n == 1)
    return x.map(lambda bound: np.broadcast_to(bound, inner).reshape(outer))


def _static(dims: Iterable[AxisSize]) -> list[int] | None:
    """Sizes that are all numbers."""
    sizes = list(dims)
    known = [size for size in sizes if isinstance(size, int)]
    return known if len(known) == len(sizes) else None


def _matched(before: Dims, after: Dims) -> list[tuple[slice, slice]]:
    """Runs of axes that hold the same indices, from the left and, behind what is unknown, from the right."""
    left = _prefixes(before, after)
    i, j = left[-1] if left else (0, 0)
    right = _prefixes(before[i:][::-1], after[j:][::-1])
    ends = [(len(before) - a, len(after) - b) for a, b in reversed(right)]
    marks = [(0, 0), *left, *ends, (len(before), len(after))]
    pairs = itertools.pairwise(marks)
    return [(slice(a, c), slice(b, d)) for (a, b), (c, d) in pairs if (a, b) != (c, d)]


def _prefixes(before: Dims, after: Dims) -> list[tuple[int, int]]:
    """Lengths of first axes that have equal products."""
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        p, q = before[i], after[j]
        i, j = i + 1, j + 1
        while p != q and isinstance(p, int) and isinstance(q, int):
            longer, k = (before, i) if p < q else (after, j)
            factor = longer[k] if k < len(longer) else None
            if not isinstance(factor, int):
                return found
            p, q, i, j = (p * factor, q, i + 1, j) if p < q else (p, q * factor, i, j + 1)
        if p is None or p != q:
            return found
        found.append((i, j))
    return found


# ---- the rules -------------------------------------------------------------------------------------------


def picked(site: IntervalNode) -> Interval:
    """Bounds of a result whose elements are all among the first input's."""
    return site.at(0).hull()


def picked_or_zero(site: IntervalNode) -> Interval:
    """Bounds of a result whose elements are among the first input's, or 0."""
    return site.at(0).hull().union(ZERO)


SHAPE_RULES: Mapping[str, IntervalRule] = {
    **dict.fromkeys(("Identity", "Expand"), lambda site: site.at(0)),
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
    "Transpose": _transpose,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("Tile", "GatherElements", "GatherND", "Compress"), picked),
    "ConstantOfShape": _filled,
    "MaxPool": _max_pool,
    "GlobalMaxPool": _global_pool,
    "ReduceMax": _reduce,
    "ReduceMin": _reduce,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    **dict.fromkeys(("Resize", "Upsample"), _resize),
}
