"""Tensors made larger or from nothing: Expand, Tile, ConstantOfShape, Range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from onnxfuse.pytorch.bridge.hostmath import INTEGERS, fixed, hosted
from onnxfuse.pytorch.bridge.operands import like, moved
from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.tensors import torch_type
from onnxfuse.pytorch.bridge.values import MOST_ON_HOST, Call, Host, Value, object_array


def _expand_host(call: Call, array: Host, target: Host) -> Value | None:
    sizes = fixed(target)
    if sizes is None:
        return None
    wide = np.broadcast_shapes(array.shape, tuple(int(size) for size in sizes.reshape(-1)))
    return hosted(np.broadcast_to(array, wide), call.dtype(0)) if math.prod(wide) <= MOST_ON_HOST else None


@rule("Expand", host=_expand_host)
def expand(call: Call) -> Value:
    rank, x, sizes = call.rank(0), call.tensor(0), call.sizes(1)
    if isinstance(sizes, fx.Node) or rank is None:
        return moved(call, call.emit(expanded, x, sizes), None)
    before = len(sizes) - rank
    own = [1] * max(before, 0) + list(call.known_sizes(0) or [None] * rank)
    sizes = [1] * max(-before, 0) + sizes
    result: list[Any] = []
    for place, (size, there) in enumerate(zip(sizes, own, strict=True)):
        if not isinstance(size, fx.Node):
            result.append(-1 if size == 1 and place >= before else size)
        elif there == 1:
            result.append(size)
        elif _is_own(call, x, place - before, size):
            result.append(-1)
        else:
            return moved(call, call.emit(expanded, x, sizes), len(sizes))
    if all(not isinstance(size, fx.Node) and size == -1 for size in result):
        return like(call, x)
    return moved(call, call.method("expand", x, result), len(result))


def _is_own(call: Call, x: fx.Node, axis: int, size: fx.Node) -> bool:
    """Whether that is the tensor's own size, as far as can be seen."""
    if axis >= 0 and x.op == "call_method" and x.target == "reshape" and isinstance(x.args[1], list):
        return x.args[1][axis] is size
    return axis >= 0 and call.scope.size(x, axis) is size


def expanded(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The tensor broadcast both ways: a 1 among the sizes keeps its own."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(sizes)))


def _tile_host(call: Call, array: Host, repeats: Host) -> Value | None:
    counts = fixed(repeats)
    if counts is None or math.prod(counts.tolist()) * array.size > MOST_ON_HOST:
        return None
    return hosted(np.tile(array, counts), call.dtype(0))


@rule("Tile", host=_tile_host)
def tile(call: Call) -> Value:
    return like(call, call.method("repeat", call.tensor(0), call.sizes(1)))


# --- tensors from shapes ------------------------------------------------------------------------------------


@rule("ConstantOfShape", host=lambda call, target: _constant_host(call, target))
def constant_of_shape(call: Call) -> Value:
    fill, sizes = _filling(call), call.sizes(0)
    dtype = torch_type(fill.dtype)
    if dtype is None:
        call.refuse(f"torch has no element type {fill.dtype}")
    node = call.emit(torch.full, sizes, fill.item(), dtype=dtype, device=call.device())
    return Value("", dtype, None if isinstance(sizes, fx.Node) else len(sizes), node)


def _filling(call: Call) -> np.ndarray:
    value = call.attr("value")
    return np.zeros(1, np.float32) if value is None else np.array(value).reshape(1)


def _constant_host(call: Call, target: Host) -> Value | None:
    sizes, fill = fixed(target), _filling(call)
    if sizes is None or fill.dtype.kind not in "ib" or math.prod(sizes.tolist()) > MOST_ON_HOST:
        return None
    array = np.full(tuple(int(size) for size in sizes.reshape(-1)), fill.item(), object)
    return hosted(array, torch_type(fill.dtype))


def _range_host(call: Call, start: Host, limit: Host, step: Host) -> Value | None:
    ends = [fixed(array) for array in (start, limit, step)]
    if None in [None if end is None else 0 for end in ends] or call.dtype(0) not in INTEGERS:
        return None
    numbers = range(*(int(end.reshape(())) for end in ends if end is not None))
    return hosted(object_array(list(numbers)), call.dtype(0)) if len(numbers) <= MOST_ON_HOST else None


@rule("Range", host=_range_host)
def range_(call: Call) -> Value:
    bounds = [_scalar(call, index) for index in range(3)]
    dtype = call.dtype(0)
    node = call.emit(torch.arange, *bounds, dtype=dtype, device=call.device())
    return Value("", dtype, 1, node)


def _scalar(call: Call, index: int) -> Any:
    """The only element of an input as a number, or as a node that yields one."""
    host = call.host(index)
    return call.method("item", call.tensor(index)) if host is None else host.reshape(-1)[0]
