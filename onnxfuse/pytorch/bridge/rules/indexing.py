"""Operators that pick, place and sort elements: Gather, Scatter, TopK, ArgMax, OneHot, NonZero, Unique."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from onnxfuse.pytorch.bridge.hostmath import as_host, fixed, hosted
from onnxfuse.pytorch.bridge.operands import number, refuse_wide_unsigned
from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.values import Call, Host, Value

# --- Gather -------------------------------------------------------------------------------------------------


def _gather_host(call: Call, array: Host, indices: Host) -> Value | None:
    places = fixed(indices)
    if places is None:
        return None
    try:
        return hosted(as_host(np.take(array, places.astype(int), call.attr("axis", 0))), call.dtype(0))
    except IndexError:
        call.refuse("an index is out of range")


@rule("Gather", host=_gather_host)
def gather(call: Call) -> Value:
    x, rank, axis = call.tensor(0), call.rank(0), call.attr("axis", 0)
    places = call.rank(1)
    after = None if rank is None or places is None else rank + places - 1
    host = call.host(1)
    if host is not None and host.ndim == 0:
        return Value("", call.dtype(0), after, call.emit(torch.select, x, axis, host[()]))
    if host is not None and _is_run(host):
        return Value("", call.dtype(0), after, call.emit(torch.narrow, x, axis, host[0], len(host)))
    if places is None or (axis < 0 and rank is None):
        return Value("", call.dtype(0), after, call.emit(taken, x, axis, call.tensor(1)))
    axis += (rank or 0) if axis < 0 else 0
    if places == 0:
        return Value("", call.dtype(0), after, call.emit(taken, x, axis, call.tensor(1)))
    if axis == 0 and rank == 2 and call.value(0).stored and _is_float(call, 0):
        positive = host is not None and all(not isinstance(i, fx.Node) and i >= 0 for i in host.flat)
        node = call.emit(F.embedding if positive else embedding, call.tensor(1), x)
    else:
        index = (*[slice(None)] * axis, call.tensor(1))
        node = call.emit(operator.getitem, x, index if axis else index[0])
    return Value("", call.dtype(0), after, node)


def _is_run(host: Host) -> bool:
    """Whether indices are one next to the other."""
    places = fixed(host)
    if places is None or places.ndim != 1 or not len(places) or (places[0] < 0 <= places[-1]):
        return False
    return bool((np.diff(places) == 1).all())


def _is_float(call: Call, index: int) -> bool:
    dtype = call.dtype(index)
    return dtype is not None and dtype.is_floating_point


def embedding(indices: Tensor, table: Tensor) -> Tensor:
    """Rows of a table; indices below 0 count from its end."""
    return F.embedding(from_start(indices, table.size(0)), table)


def taken(x: Tensor, axis: int, indices: Tensor) -> Tensor:
    """Slices along an axis, where the rank of the indices is 0 or unknown at import.

    torch would fetch a single index from the device.
    """
    axis %= x.dim()
    y = x.movedim(axis, 0)[indices.reshape(-1)].movedim(0, axis)
    return y.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def from_start(indices: Tensor, size: int) -> Tensor:
    """Indices as torch.gather takes them: int64, and counted from the start."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


@rule("GatherElements")
def gather_elements(call: Call) -> Value:
    node = call.emit(gathered, call.tensor(0), call.attr("axis", 0), call.tensor(1))
    return Value("", call.dtype(0), call.rank(0), node)


def gathered(x: Tensor, axis: int, indices: Tensor) -> Tensor:
    """torch.gather with indices that may count from the end."""
    return torch.gather(x, axis, from_start(indices, x.size(axis)))


@rule("GatherND")
def gather_nd(call: Call) -> fx.Node:
    return call.emit(gathered_nd, call.tensor(0), call.tensor(1), call.attr("batch_dims", 0))


def gathered_nd(x: Tensor, indices: Tensor, batch: int) -> Tensor:
    """Slices of x, by tuples of indices along the last axis of `indices`."""
    places: list[Tensor] = []
    for axis in range(batch):
        shape = [1] * (indices.dim() - 1)
        shape[axis] = x.size(axis)
        places.append(torch.arange(x.size(axis), device=x.device).reshape(shape))
    return x[(*places, *indices.unbind(-1))]


# --- Scatter ------------------------------------------------------------------------------------------------

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _reduction(call: Call) -> str:
    found: str = call.attr("reduction", "none")
    if found not in ("none", *_REDUCTIONS):
        call.refuse(f"reduction '{found}' is unknown")
    return found


@rule("ScatterElements", "Scatter")
def scatter_elements(call: Call) -> Value:
    x, indices, updates = (call.tensor(index) for index in range(3))
    node = call.emit(scattered, x, call.attr("axis", 0), indices, updates, _reduction(call))
    return Value("", call.dtype(0), call.rank(0), node)


def scattered(x: Tensor, axis: int, indices: Tensor, updates: Tensor, reduction: str) -> Tensor:
    """Elements of x replaced by updates, or combined with them, along an axis."""
    indices = from_start(indices, x.size(axis))
    if reduction == "none":
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, _REDUCTIONS[reduction])


@rule("ScatterND")
def scatter_nd(call: Call) -> Value:
    x, indices, updates = (call.tensor(index) for index in range(3))
    node = call.emit(scattered_nd, x, indices, updates, _reduction(call))
    return Value("", call.dtype(0), call.rank(0), node)


def scattered_nd(x: Tensor, indices: Tensor, updates: Tensor, reduction: str) -> Tensor:
    """Slices of x replaced by updates, or combined with them, by tuples of indices along the last axis."""
    if reduction in ("none", "add"):
        return x.index_put(indices.unbind(-1), updates, accumulate=reduction == "add")
    depth = indices.size(-1)
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for axis, index in enumerate(indices.unbind(-1)):
        flat = flat * x.size(axis) + from_start(index, x.size(axis))
    rows = x.reshape(math.prod(x.shape[:depth]), -1)
    changes = updates.reshape(flat.numel(), -1)
    places = flat.reshape(-1, 1).expand_as(changes)
    return rows.scatter_reduce(0, places, changes, _REDUCTIONS[reduction]).reshape(x.shape)


# --- order --------------------------------------------------------------------------------------------------


@rule("TopK")
def top_k(call: Call) -> tuple[Value, Value]:
    refuse_wide_unsigned(call)
    if call.opset < 10:
        count = call.attr("k")
    else:
        count = number(call, 1)
        count = call.method("item", call.tensor(1)) if count is None else count
    largest = bool(call.attr("largest", 1))
    both = call.emit(first_k, call.tensor(0), count, call.attr("axis", -1), largest)
    values = Value("", call.dtype(0), call.rank(0), call.item(both, 0))
    return values, Value("", torch.int64, call.rank(0), call.item(both, 1))


def first_k(x: Tensor, count: int, axis: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The largest or smallest elements and where they are; the first of equal ones, unlike torch.topk."""
    values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def _place_of(kind: str, function: Callable[..., Any], from_the_end: Callable[..., Any]) -> None:
    @rule(kind)
    def convert(call: Call) -> Value:
        refuse_wide_unsigned(call)
        axis, keep, rank = call.attr("axis", 0), bool(call.attr("keepdims", 1)), call.rank(0)
        found = from_the_end if call.attr("select_last_index", 0) else function
        after = rank if rank is None or keep else rank - 1
        return Value("", torch.int64, after, call.emit(found, call.tensor(0), axis, keep))


def last_argmax(x: Tensor, axis: int, keep: bool) -> Tensor:
    """argmax that takes the last of equal elements."""
    return x.size(axis) - 1 - x.flip(axis).argmax(axis, keep)


def last_argmin(x: Tensor, axis: int, keep: bool) -> Tensor:
    """argmin that takes the last of equal elements."""
    return x.size(axis) - 1 - x.flip(axis).argmin(axis, keep)


_place_of("ArgMax", torch.argmax, last_argmax)
_place_of("ArgMin", torch.argmin, last_argmin)


@rule("Unique")
def unique(call: Call) -> tuple[fx.Node, ...]:
    found = call.emit(uniques, call.tensor(0), call.attr("axis"), bool(call.attr("sorted", 1)))
    return tuple(call.item(found, index) for index in range(call.outputs))


def uniques(x: Tensor, axis: int | None, ordered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values that occur, where each is first, which each element has, and how often each occurs."""
    values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True, dim=axis)
    inverse = inverse.reshape(-1)
    places = torch.arange(inverse.numel(), device=x.device)
    first = torch.full_like(counts, inverse.numel()).scatter_reduce(0, inverse, places, "amin")
    if not ordered:
        order = first.argsort()
        values = values.index_select(axis or 0, order)
        inverse = order.argsort()[inverse]
        first, counts = first[order], counts[order]
    return values, first, inverse, counts


# --- by condition -------------------------------------------------------------------------------------------


def _nonzero_host(call: Call, array: Host) -> Value | None:
    numbers = fixed(array)
    if numbers is None or numbers.ndim == 0:
        return None
    return hosted(np.array(np.nonzero(numbers)).astype(object), torch.int64)


@rule("NonZero", host=_nonzero_host)
def nonzero(call: Call) -> Value:
    return Value("", torch.int64, 2, call.method("t", call.emit(torch.nonzero, call.tensor(0))))


@rule("Compress")
def compress(call: Call) -> Value:
    axis = call.attr("axis")
    node = call.emit(compressed, call.tensor(0), call.tensor(1), axis)
    return Value("", call.dtype(0), 1 if axis is None else call.rank(0), node)


def compressed(x: Tensor, keep: Tensor, axis: int | None) -> Tensor:
    """The slices along an axis (elements, without one) whose flag is set; flags may be fewer."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, keep.nonzero().reshape(-1))


@rule("OneHot")
def one_hot(call: Call) -> Value:
    depth = number(call, 1)
    if depth is None:
        depth = call.emit(int, call.method("item", call.tensor(1)))
    node = call.emit(one_hot_of, call.tensor(0), depth, call.tensor(2), call.attr("axis", -1))
    rank = call.rank(0)
    return Value("", call.dtype(2), None if rank is None else rank + 1, node)


def one_hot_of(indices: Tensor, depth: int, values: Tensor, axis: int) -> Tensor:
    """values[1] at the indices along a new axis, values[0] elsewhere; an index out of range is nowhere."""
    axis %= indices.dim() + 1
    places = torch.arange(depth, device=indices.device).reshape(-1, *[1] * (indices.dim() - axis))
    hot = from_start(indices, depth).unsqueeze(axis) == places
    return torch.where(hot, values[1], values[0])


@rule("ReverseSequence")
def reverse_sequence(call: Call) -> Value:
    axes = call.attr("time_axis", 0), call.attr("batch_axis", 1)
    node = call.emit(reversed_sequence, call.tensor(0), call.tensor(1), *axes)
    return Value("", call.dtype(0), call.rank(0), node)


def reversed_sequence(x: Tensor, lengths: Tensor, time: int, batch: int) -> Tensor:
    """The first elements of each sequence in reverse, as many as its length says."""
    steps = torch.arange(x.size(time), device=x.device).reshape(-1, 1)
    index = torch.where(steps < lengths, lengths - 1 - steps, steps)
    index = index if time < batch else index.t()
    shape = [size if axis in (time, batch) else 1 for axis, size in enumerate(x.shape)]
    return x.gather(time, index.reshape(shape).expand_as(x))
