"""Sequences of tensors, which unoptimized exports write for chunk and split: plain Python lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from onnxfuse.pytorch.bridge.operands import number
from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.values import Call, Value, object_array


@rule("SplitToSequence")
def split_to_sequence(call: Call) -> fx.Node:
    x, axis = call.tensor(0), call.attr("axis", 0)
    if not call.has(1):
        keep = call.attr("keepdims", 1)
        return call.emit(list, call.method("split", x, 1, axis) if keep else call.method("unbind", x, axis))
    if call.rank(1) is None:
        call.refuse("whether its parts are listed or have one size is unknown")
    return call.emit(
        list, call.method("split", x, call.sizes(1) if call.rank(1) else _position(call, 1), axis)
    )


def _position(call: Call, index: int) -> Any:
    found = number(call, index)
    return call.method("item", call.tensor(index)) if found is None else found


@rule("SequenceConstruct")
def sequence_construct(call: Call) -> fx.Node:
    return call.emit(listed, *call.tensors())


def listed(*tensors: Tensor) -> list[Tensor]:
    """The arguments as a list."""
    return list(tensors)


@rule("SequenceEmpty")
def sequence_empty(call: Call) -> fx.Node:
    return call.emit(listed)


@rule("SequenceAt")
def sequence_at(call: Call) -> fx.Node:
    return call.item(call.tensor(0), _position(call, 1))


@rule("SequenceLength")
def sequence_length(call: Call) -> Value:
    return Value("", torch.int64, 0, host=object_array(call.emit(len, call.tensor(0))))


@rule("SequenceInsert")
def sequence_insert(call: Call) -> fx.Node:
    place = _position(call, 2) if call.has(2) else None
    return call.emit(inserted, call.tensor(0), call.tensor(1), place)


def inserted(sequence: Sequence[Tensor], tensor: Tensor, place: int | None) -> list[Tensor]:
    """A new list with the tensor at that place, at the end without one."""
    result = list(sequence)
    result.insert(len(result) if place is None else place, tensor)
    return result


@rule("SequenceErase")
def sequence_erase(call: Call) -> fx.Node:
    return call.emit(erased, call.tensor(0), _position(call, 1) if call.has(1) else -1)


def erased(sequence: Sequence[Tensor], place: int) -> list[Tensor]:
    """A new list without the tensor at that place."""
    result = list(sequence)
    del result[place]
    return result


@rule("ConcatFromSequence")
def concat_from_sequence(call: Call) -> fx.Node:
    function = torch.stack if call.attr("new_axis", 0) else torch.cat
    return call.emit(function, call.tensor(0), call.attr("axis"))
