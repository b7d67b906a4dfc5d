"""Slice, and the negative steps that torch has not."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx

from onnxfuse.pytorch.bridge.hostmath import hosted
from onnxfuse.pytorch.bridge.operands import like
from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.values import Call, Host, Value

FURTHEST = 2**31 - 1
"""Bounds from here on mean the end: exporters write the largest int32 or int64."""


@rule("Slice", host=lambda call, array, *_: _slice_host(call, array))
def slice_(call: Call) -> Value:
    starts, ends, axes, steps = bounds = _bounds(call)
    x, rank = call.tensor(0), call.rank(0)
    if any(isinstance(bound, fx.Node) for bound in bounds):
        return like(call, call.emit(sliced, x, *bounds))
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    forward: dict[int, slice] = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis + rank if axis < 0 and rank is not None else axis
        if isinstance(step, fx.Node):
            return like(call, call.emit(sliced, call.tensor(0), starts, ends, axes, steps))
        if step < 0 and _is_whole(start, end):
            x = call.method("flip", x, axis)
            forward[axis] = slice(None, None, None if step == -1 else -step)
        elif step < 0:
            x = call.emit(backwards, x, axis, start, end, step)
        else:
            forward[axis] = slice(_start(start), _end(end), None if step == 1 else step)
    forward = {axis: part for axis, part in forward.items() if part != slice(None)}
    if not forward:
        return like(call, x)
    if min(forward) < 0 <= max(forward):
        return like(call, call.emit(sliced, call.tensor(0), starts, ends, axes, steps))
    return like(call, call.emit(operator.getitem, x, _index(forward)))


def _index(parts: dict[int, Any]) -> tuple[Any, ...]:
    """The index of a tensor: some axes by number, all of them counted from the same end."""
    if min(parts) >= 0:
        return tuple(parts.get(axis, slice(None)) for axis in range(max(parts) + 1))
    return (Ellipsis, *(parts.get(axis, slice(None)) for axis in range(min(parts), 0)))


def _bounds(call: Call) -> tuple[Any, Any, Any, Any]:
    """Starts, ends, axes and steps: lists, None for a missing one, or nodes that yield lists."""
    if call.opset < 10:
        return call.attr("starts"), call.attr("ends"), call.attr("axes"), None
    axes = call.axes(3) if call.has(3) else None
    return call.sizes(1), call.sizes(2), axes, call.sizes(4) if call.has(4) else None


def _is_whole(start: Any, end: Any) -> bool:
    """Whether these are all elements, backwards."""
    if isinstance(start, fx.Node) or isinstance(end, fx.Node):
        return False
    return (start == -1 or start >= FURTHEST) and end <= -FURTHEST


def _start(bound: Any) -> Any:
    whole = not isinstance(bound, fx.Node) and (bound == 0 or bound <= -FURTHEST)
    return None if whole else bound


def _end(bound: Any) -> Any:
    return None if not isinstance(bound, fx.Node) and bound >= FURTHEST else bound


def _slice_host(call: Call, array: Host) -> Value | None:
    bounds = _bounds(call)
    if any(isinstance(bound, fx.Node) for bound in bounds):
        return None
    starts, ends, axes, steps = bounds
    if any(isinstance(bound, fx.Node) for bound in (*starts, *ends, *(steps or ()))):
        return None
    axes = range(len(starts)) if axes is None else axes
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(starts), strict=True):
        array = np.take(array, range(*slice(start, end, step).indices(array.shape[axis])), axis)
    return hosted(array, call.dtype(0))


def backwards(x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    """A slice with a negative step, which torch has not."""
    size = x.size(axis)
    first, last, _ = slice(start, end, step).indices(size)
    return sliced(x.flip(axis), [size - 1 - first], [size - 1 - last], [axis], [-step])


def sliced(
    x: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """Slice with whatever is computed from data."""
    axes = range(len(starts)) if axes is None else axes
    for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(starts), strict=True):
        if step < 0:
            x = backwards(x, axis, start, end, step)
        else:
            x = x.movedim(axis, 0)[start:end:step].movedim(0, axis)
    return x
