"""Reductions over axes, which older operator sets give as an attribute and newer ones as an input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from onnxfuse.pytorch.bridge import hostmath
from onnxfuse.pytorch.bridge.hostmath import as_host, hosted
from onnxfuse.pytorch.bridge.operands import refuse_wide_unsigned
from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.values import Call, Host, Value

Reduction = Callable[[Call, fx.Node, "list[int] | None", bool], fx.Node]
"""Emits a reduction of a tensor over axes (None for all), which are kept with size 1 or not."""

Elements = Callable[[Call, fx.Node], fx.Node]
"""Emits what goes before or after."""


def _axes(call: Call) -> list[int] | None:
    """The axes; None for all of them, [] for none."""
    axes = call.axes(1)
    if not axes:
        return [] if call.attr("noop_with_empty_axes", 0) else None
    rank = call.rank(0)
    return sorted(axis + rank if axis < 0 and rank is not None else axis for axis in axes)


def _reducing(
    kind: str,
    function: Reduction,
    before: Elements | None = None,
    after: Elements | None = None,
    alone: Elements | None = None,
) -> None:
    """A rule for a reduction.

    Args:
        kind: the operator.
        function: emits it.
        before, after: what goes before and after.
        alone: what it makes of a single element, where that is another one: so much is left without axes.
    """

    @rule(kind, host=_HOST.get(kind))
    def convert(call: Call) -> Value:
        refuse_wide_unsigned(call)
        axes, keep, rank = _axes(call), bool(call.attr("keepdims", 1)), call.rank(0)
        node = call.tensor(0) if before is None else before(call, call.tensor(0))
        if axes != []:
            if axes is None and rank is not None:
                axes = list(range(rank))
            node = function(call, node, axes, keep)
            if not keep:
                rank = None if rank is None or axes is None else rank - len(axes)
        elif alone is not None:
            node = alone(call, node)
        node = node if after is None else after(call, node)
        return Value("", call.dtype(0), rank, node)


def _host_reduction(function: hostmath.Scalar) -> Callable[..., Value | None]:
    def host(call: Call, array: Host, *_: Host) -> Value | None:
        axes = _axes(call)
        if axes == []:
            return hosted(array, call.dtype(0))
        axes = list(range(array.ndim)) if axes is None else axes
        for axis in reversed(axes):
            parts = [as_host(part) for part in np.moveaxis(array, axis, 0)]
            if not parts:
                return None
            array = reduce(lambda a, b: _combined(call, function, a, b), parts)
            array = np.expand_dims(array, axis) if call.attr("keepdims", 1) else array
        return hosted(array, call.dtype(0)) if call.dtype(0) in hostmath.INTEGERS else None

    return host


def _combined(call: Call, function: hostmath.Scalar, a: Host, b: Host) -> Host:
    result = hostmath.elementwise(call, function, [a, b])
    assert result is not None
    return result


_HOST = {
    "ReduceSum": _host_reduction(hostmath.add),
    "ReduceProd": _host_reduction(hostmath.multiply),
    "ReduceMax": _host_reduction(hostmath.maximum),
    "ReduceMin": _host_reduction(hostmath.minimum),
}


# --- reductions ---------------------------------------------------------------------------------------------


def _integer(call: Call) -> bool:
    dtype = call.dtype(0)
    return dtype is not None and not dtype.is_floating_point


def _sum(call: Call, x: fx.Node, axes: list[int] | None, keep: bool) -> fx.Node:
    if call.dtype(0) is None:
        return call.emit(summed, x, axes, keep)
    options: dict[str, Any] = {"dtype": call.dtype(0)} if _integer(call) else {}  # torch would make it int64
    return call.emit(torch.sum, x, axes, keep, **options)


def summed(x: Tensor, axes: list[int] | None, keep: bool) -> Tensor:
    """The sum in the tensor's own type, which is unknown at import."""
    return torch.sum(x, axes, keep, dtype=x.dtype)


def _mean(call: Call, x: fx.Node, axes: list[int] | None, keep: bool) -> fx.Node:
    if 0 in (call.known_sizes(0) or ()):
        return call.emit(summed, x, axes, keep)  # of no elements it is 0 in ONNX Runtime, NaN in torch
    function = torch.mean if call.dtype(0) is not None and not _integer(call) else averaged
    return call.emit(function, x, axes, keep)


def averaged(x: Tensor, axes: list[int] | None, keep: bool) -> Tensor:
    """The mean of a tensor of any type: that of integers is cut off."""
    if x.is_floating_point():
        return torch.mean(x, axes, keep)
    return torch.mean(x.double(), axes, keep).to(x.dtype)


def _product(call: Call, x: fx.Node, axes: list[int] | None, keep: bool) -> fx.Node:
    if axes is not None and len(axes) == 1 and call.dtype(0) is not None:
        return call.emit(torch.prod, x, axes[0], keep, dtype=call.dtype(0))
    return call.emit(multiplied, x, axes, keep)


def multiplied(x: Tensor, axes: list[int] | None, keep: bool) -> Tensor:
    """The product over several axes, where torch.prod knows one."""
    places = range(x.dim()) if axes is None else [axis % max(x.dim(), 1) for axis in axes]
    for axis in sorted(places, reverse=True):
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


def _largest(call: Call, x: fx.Node, axes: list[int] | None, keep: bool) -> fx.Node:
    return call.emit(largest if 0 in (call.known_sizes(0) or ()) else torch.amax, x, axes or (), keep)


def _smallest(call: Call, x: fx.Node, axes: list[int] | None, keep: bool) -> fx.Node:
    return call.emit(smallest if 0 in (call.known_sizes(0) or ()) else torch.amin, x, axes or (), keep)


def largest(x: Tensor, axes: Sequence[int], keep: bool) -> Tensor:
    """The maximum of no elements: the least that there is."""
    return torch.full_like(x.sum(tuple(axes), keep, dtype=x.dtype), _limits(x)[0])


def smallest(x: Tensor, axes: Sequence[int], keep: bool) -> Tensor:
    """The minimum of no elements: the most that there is."""
    return torch.full_like(x.sum(tuple(axes), keep, dtype=x.dtype), _limits(x)[1])


def _limits(x: Tensor) -> tuple[float, float]:
    if x.dtype == torch.bool:
        return False, True
    if x.is_floating_point():
        return -math.inf, math.inf
    return torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max


def _norm(call: Call, x: fx.Node, axes: list[int] | None, keep: bool) -> fx.Node:
    if call.dtype(0) is not None and not _integer(call):
        return call.emit(torch.linalg.vector_norm, x, 2, axes, keep)
    return call.emit(norm, x, axes, keep)


def norm(x: Tensor, axes: list[int] | None, keep: bool) -> Tensor:
    """The Euclidean norm of a tensor of any type."""
    if x.is_floating_point():
        return torch.linalg.vector_norm(x, 2, axes, keep)
    return torch.linalg.vector_norm(x.double(), 2, axes, keep).to(x.dtype)


def _log_sum_exp(call: Call, x: fx.Node, axes: list[int] | None, keep: bool) -> fx.Node:
    if axes is None:
        call.refuse("the rank of its input is unknown")
    return call.emit(torch.logsumexp, x, axes, keep)


def _absolute(call: Call, x: fx.Node) -> fx.Node:
    return call.emit(torch.abs, x)


def _square(call: Call, x: fx.Node) -> fx.Node:
    return call.emit(torch.square, x)


def _log(call: Call, x: fx.Node) -> fx.Node:
    return call.emit(torch.log, x)


_reducing("ReduceSum", _sum)
_reducing("ReduceMean", _mean)
_reducing("ReduceProd", _product)
_reducing("ReduceMax", _largest)
_reducing("ReduceMin", _smallest)
_reducing("ReduceL1", _sum, before=_absolute)
_reducing("ReduceL2", _norm, alone=_absolute)
_reducing("ReduceLogSum", _sum, after=_log)
_reducing("ReduceLogSumExp", _log_sum_exp)
_reducing("ReduceSumSquare", _sum, before=_square)
