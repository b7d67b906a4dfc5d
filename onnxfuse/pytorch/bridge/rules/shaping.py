"""Operators on shapes and layout: Shape, Reshape, Transpose, Squeeze, Concat, Split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from onnxfuse.pytorch.bridge.hostmath import as_host, fixed, hosted
from onnxfuse.pytorch.bridge.operands import like, moved
from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.values import Call, Host, Value, object_array


def _on_host(call: Call, array: Any) -> Value | None:
    return hosted(as_host(array), call.dtype(0))


# --- sizes --------------------------------------------------------------------------------------------------


@rule("Shape", host=lambda call, array: hosted(object_array(_part(call, list(array.shape))), torch.int64))
def shape(call: Call) -> Value:
    value = call.value(0)
    sizes: list[Any] | None = list(value.sizes or ()) if value.stored else call.shape(0)
    if sizes is not None:
        return Value("", torch.int64, 1, host=object_array(_part(call, sizes)))
    node = call.emit(shape_of, call.tensor(0), call.attr("start", 0), call.attr("end"))
    return Value("", torch.int64, 1, node)


def _part(call: Call, sizes: list[Any]) -> list[Any]:
    return sizes[slice(call.attr("start", 0), call.attr("end"))]


def shape_of(x: Tensor, start: int, end: int | None) -> Tensor:
    """The shape as a tensor, for a tensor whose rank is unknown at import."""
    return torch.tensor(x.shape[start:end], dtype=torch.int64, device=x.device)


@rule("Size", host=lambda call, array: hosted(as_host(array.size), torch.int64))
def size(call: Call) -> Value:
    return Value("", torch.int64, 0, host=as_host(call.method("numel", call.tensor(0))))


# --- Reshape and its kin ------------------------------------------------------------------------------------


def _reshape_host(call: Call, array: Host, target: Host) -> Value | None:
    if fixed(target) is None:
        return None
    sizes = list(target)
    if not call.attr("allowzero", 0):
        sizes = [array.shape[place] if size == 0 else size for place, size in enumerate(sizes)]
    return _on_host(call, array.reshape(sizes))


@rule("Reshape", host=_reshape_host)
def reshape(call: Call) -> Value:
    keeps = not call.attr("allowzero", 0)
    x, sizes = call.tensor(0), call.sizes(1)
    if isinstance(sizes, fx.Node):
        function = reshaped if keeps else Tensor.reshape
        return moved(call, call.emit(function, x, sizes), None)
    if keeps:
        sizes = [call.scope.size(x, axis) if _is_zero(size) else size for axis, size in enumerate(sizes)]
    return moved(call, call.method("reshape", x, sizes), len(sizes))


def _is_zero(size: Any) -> bool:
    return not isinstance(size, fx.Node) and size == 0


def reshaped(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Reshape to sizes that are computed from data; 0 keeps a size."""
    return x.reshape([size or x.size(axis) for axis, size in enumerate(sizes)])


@rule("Flatten")
def flatten(call: Call) -> Value:
    x, rank = call.tensor(0), call.rank(0)
    axis = call.attr("axis", 1)
    if rank is None:
        return moved(call, call.emit(flattened, x, axis), 2)
    axis += rank if axis < 0 else 0
    if axis == 0:
        return moved(call, call.method("unsqueeze", call.method("flatten", x), 0), 2)
    if axis == rank:
        return moved(call, call.method("unsqueeze", call.method("flatten", x), 1), 2)
    if axis > 1:
        x = call.method("flatten", x, 0, axis - 1)
    return moved(call, call.emit(torch.flatten, x, 1), 2)


def flattened(x: Tensor, axis: int) -> Tensor:
    """Flatten of a tensor whose rank is unknown at import."""
    axis += x.dim() if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _permutation(call: Call, rank: int) -> list[int]:
    return [int(axis) for axis in call.attr("perm", list(range(rank))[::-1])]


@rule("Transpose", host=lambda call, array: _on_host(call, array.transpose(_permutation(call, array.ndim))))
def transpose(call: Call) -> Value:
    rank = call.rank(0)
    x = call.tensor(0)
    if rank is None and call.attr("perm") is None:
        return moved(call, call.emit(reversed_axes, x), None)
    order = _permutation(call, rank or 0)
    swapped = [axis for axis, source in enumerate(order) if axis != source]
    if not swapped:
        return like(call, x)
    if len(swapped) == 2:
        return moved(call, call.method("transpose", x, *swapped), len(order))
    return moved(call, call.method("permute", x, order), len(order))


def reversed_axes(x: Tensor) -> Tensor:
    """Transpose of a tensor whose rank is unknown at import."""
    return x.permute(list(range(x.dim()))[::-1])


def _squeeze_host(call: Call, array: Host) -> Value | None:
    axes = call.axes()
    return _on_host(call, np.squeeze(array, tuple(axes) if axes else None))


@rule("Squeeze", host=lambda call, array, *_: _squeeze_host(call, array))
def squeeze(call: Call) -> Value:
    axes, rank = call.axes(), call.rank(0)
    if not axes:  # ONNX Runtime takes an empty list of them for none
        return moved(call, call.method("squeeze", call.tensor(0)), None)
    node = call.method("squeeze", call.tensor(0), axes[0] if len(axes) == 1 else tuple(axes))
    return moved(call, node, None if rank is None else rank - len(axes))


@rule(
    "Unsqueeze", host=lambda call, array, *_: _on_host(call, np.expand_dims(array, tuple(call.axes() or ())))
)
def unsqueeze(call: Call) -> Value:
    axes, rank = call.axes() or [], call.rank(0)
    after = None if rank is None else rank + len(axes)
    if after is not None and min(axes, default=0) < 0 <= max(axes, default=0):
        axes = [axis % after for axis in axes]
    if min(axes, default=0) < 0 <= max(axes, default=0):
        call.refuse(f"axes {axes} can't be combined for a tensor of unknown rank")
    node = call.tensor(0)
    # Axes count in the result: from the left, the leftmost comes first; from the right, the rightmost.
    for axis in sorted(axes, reverse=min(axes, default=0) < 0):
        node = call.method("unsqueeze", node, axis)
    return moved(call, node, after)


# --- Concat and Split ---------------------------------------------------------------------------------------


def _axis(call: Call, default: int | None = None) -> int:
    axis: int | None = call.attr("axis", default)
    if axis is None:
        call.refuse("attribute 'axis' is missing")
    return axis


@rule("Concat", host=lambda call, *arrays: _on_host(call, np.concatenate(arrays, _axis(call))))
def concat(call: Call) -> Value:
    nodes = call.tensors()
    node = nodes[0] if len(nodes) == 1 else call.emit(torch.cat, nodes, _axis(call, 1))
    ranks = [call.rank(index) for index in range(len(call.inputs))]
    return moved(call, node, next((rank for rank in ranks if rank is not None), None))


def _parts(call: Call) -> list[Any] | fx.Node | None:
    """The sizes of a Split's results; None for as equal ones as can be."""
    if call.has(1):
        return call.sizes(1)
    found = call.attr("split")
    return None if found is None else list(found)


def _split_host(call: Call, array: Host, *_: Host) -> tuple[Value | None, ...] | None:
    axis, sizes = _axis(call, 0), _parts(call)
    if sizes is None:
        step = -(-array.shape[axis] // call.outputs)
        bounds = [step * place for place in range(1, call.outputs)]
    elif isinstance(sizes, fx.Node) or any(isinstance(size, fx.Node) for size in sizes):
        return None
    else:
        bounds = np.cumsum(sizes)[:-1].tolist()
    return tuple(_on_host(call, part) for part in np.split(array, bounds, axis))


@rule("Split", host=_split_host)
def split(call: Call) -> tuple[Value, ...]:
    axis, sizes, x = _axis(call, 0), _parts(call), call.tensor(0)
    if sizes is None:
        parts = call.method("chunk", x, call.outputs, axis)
    else:
        parts = call.method("split", x, sizes, axis)
    return tuple(like(call, call.item(parts, index)) for index in range(call.outputs))


@rule("Identity", host=lambda call, array: call.value(0))
def identity(call: Call) -> Value:
    return call.value(0)
