"""Pad, in all modes, by any amounts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from onnxfuse.pytorch.bridge.operands import like
from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.values import Call, Value

_PAD_MODES = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@rule("Pad")
def pad(call: Call) -> Value:
    x, mode, rank = call.tensor(0), call.attr("mode", "constant"), call.rank(0)
    pairs = _pad_pairs(call)
    if isinstance(pairs, fx.Node):
        axes = call.axes(3) if call.has(3) else None
        return like(call, call.emit(padded_by, x, pairs, axes, mode, _fill(call)))
    pairs = {axis: pair for axis, pair in pairs.items() if pair != (0, 0)}
    if not pairs:
        return like(call, x)
    amounts = [amount for axis in range(-1, min(pairs) - 1, -1) for amount in pairs.get(axis, (0, 0))]
    if mode == "constant":
        return like(call, call.emit(F.pad, x, amounts, "constant", _fill(call)))
    if mode not in _PAD_MODES:
        call.refuse(f"mode '{mode}' is unknown")
    dtype = call.dtype(0)
    plain = not any(isinstance(amount, fx.Node) or amount < 0 for amount in amounts)
    if plain and dtype is not None and dtype.is_floating_point and rank is not None:
        # torch's kernels take one to three axes, below a batch and channels or only the latter.
        count = max(len(amounts) // 2, rank - 2)
        if count <= 3 and rank > count:
            amounts += [0] * (2 * count - len(amounts))
            return like(call, call.emit(F.pad, x, amounts, _PAD_MODES[mode]))
    return like(call, call.emit(padded, x, amounts, mode))


def _fill(call: Call) -> Any:
    """The number that a constant Pad fills with."""
    if call.opset < 11:
        return call.attr("value", 0.0)
    if not call.has(2):
        return 0
    host = call.host(2)
    return host.reshape(-1)[0] if host is not None else call.method("item", call.tensor(2))


def _pad_pairs(call: Call) -> dict[int, tuple[Any, Any]] | fx.Node:
    """The amounts before and after the axes, counted from the last (-1); or the node that yields them all."""
    if call.opset < 11:
        amounts = list(call.attr("pads"))
    else:
        found = call.sizes(1)
        if isinstance(found, fx.Node):
            return found
        amounts = found
    count = len(amounts) // 2
    axes, rank = call.axes(3) if call.has(3) else None, call.rank(0)
    if axes is None:
        axes, rank = list(range(count)), count
    if rank is None and max(axes, default=-1) >= 0:
        call.refuse("it pads axes counted from the left, of a tensor of unknown rank")
    axes = [axis if axis < 0 else axis - (rank or 0) for axis in axes]
    return {axis: (amounts[place], amounts[place + count]) for place, axis in enumerate(axes)}


def padded_by(x: Tensor, pads: Sequence[int], axes: Sequence[int] | None, mode: str, fill: float) -> Tensor:
    """Pad by amounts that are computed from data."""
    count = len(pads) // 2
    places = [axis % x.dim() for axis in (range(x.dim()) if axes is None else axes)]
    amounts = [0] * (2 * x.dim())
    for place, axis in enumerate(places):
        last = x.dim() - 1 - axis
        amounts[2 * last : 2 * last + 2] = pads[place], pads[place + count]
    return F.pad(x, amounts, "constant", fill) if mode == "constant" else padded(x, amounts, mode)


def padded(x: Tensor, amounts: Sequence[int], mode: str) -> Tensor:
    """Pad other than with a constant, of any rank and by any amounts (in the order of `F.pad`)."""
    for place in range(len(amounts) // 2):
        before, after = amounts[2 * place : 2 * place + 2]
        size = x.size(-1 - place)
        index = torch.arange(-before, size + after, device=x.device)
        if mode == "wrap":
            index = index.remainder(size)
        elif mode == "edge":
            index = index.clamp(0, size - 1)
        else:
            index = index.remainder(max(2 * size - 2, 1))
            index = torch.where(index < size, index, 2 * size - 2 - index)
        x = x.index_select(-1 - place, index)
    return x
