"""What many rules share: inputs in the form that torch wants, and results with their type and rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from onnxfuse.pytorch.bridge.values import Call, Value

WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def number(call: Call, index: int) -> Any:
    """The input as a number, or a node that yields one; None for tensors and weights that train."""
    host = call.host(index)
    return host.reshape(-1)[0] if host is not None and host.size == 1 else None


def plain(call: Call, index: int) -> Any:
    """The `number` of an input, where it may stand for the input among the others.

    None for an initializer, which is a tensor of the module that may be changed, and where the shape of the
    result hangs on it.
    """
    value = call.value(index)
    if value.stored and value.key is not None:
        return None
    ranks = [call.rank(place) or 0 for place in range(len(call.inputs)) if place != index]
    return number(call, index) if (value.rank or 0) <= max(ranks, default=0) else None


def operands(call: Call) -> list[Any]:
    """All inputs, plain numbers where possible; the first is a tensor if no other is."""
    refuse_wide_unsigned(call)
    found = [plain(call, index) for index in range(len(call.inputs))]
    if None not in found:
        found[0] = None
    return [call.tensor(index) if one is None else one for index, one in enumerate(found)]


def refuse_wide_unsigned(call: Call, index: int = 0) -> None:
    """Refuse element types that torch can store, but not compute with."""
    if call.dtype(index) in WIDE_UNSIGNED:
        call.refuse(f"torch does no arithmetic on {str(call.dtype(index)).removeprefix('torch.')}")


def like(call: Call, node: fx.Node, index: int = 0) -> Value:
    """The result of an operator that keeps type and rank of an input."""
    return Value("", call.dtype(index), call.rank(index), node)


def broadcasted(call: Call, node: fx.Node, dtype: torch.dtype | None) -> Value:
    """The result of an operator that broadcasts its inputs."""
    ranks = [call.rank(index) for index in range(len(call.inputs))]
    return Value("", dtype, None if None in ranks else max(r for r in ranks if r is not None), node)


def moved(call: Call, node: fx.Node, rank: int | None) -> Value:
    """The result of an operator that moves the elements of its first input."""
    return Value("", call.dtype(0), rank, node)
