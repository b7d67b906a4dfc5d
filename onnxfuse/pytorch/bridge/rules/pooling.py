"""Pooling: over windows and over all of space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.rules.windows import (
    Window,
    ceil_ends,
    check_same,
    flat,
    is_same,
    padded,
    same_ends,
    told,
    window,
)
from onnxfuse.pytorch.bridge.values import Call

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MAX_WITH_INDICES = {
    1: F.max_pool1d_with_indices,
    2: F.max_pool2d_with_indices,
    3: F.max_pool3d_with_indices,
}
_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_ADAPTIVE_MAX = {3: F.adaptive_max_pool1d, 4: F.adaptive_max_pool2d, 5: F.adaptive_max_pool3d}


def _frame(call: Call) -> Window:
    kernel = call.attr("kernel_shape")
    if len(kernel) not in _MAX:
        call.refuse(f"torch has no pooling over {len(kernel)} axes")
    frame = window(call, kernel)
    check_same(call, frame)
    if is_same(call) and any(d != 1 for d in frame.dilations):
        call.refuse("ONNX and ONNX Runtime differ in what auto_pad is for dilated pooling")
    return frame


def _fits(frame: Window) -> bool:
    """Whether torch takes the padding: at most half of the window."""
    return frame.symmetric and all(2 * p <= e for p, e in zip(frame.before, frame.extent, strict=True))


def _ceil(call: Call) -> bool:
    return bool(call.attr("ceil_mode", 0)) and not is_same(call)


def _everything(frame: Window, ceil: bool) -> dict[str, Any]:
    """A window as arguments of the functions below."""
    return {
        "kernel": frame.kernel,
        "strides": frame.strides,
        "dilations": frame.dilations,
        "before": frame.before,
        "after": frame.after,
        "same": frame.same,
        "ceil": ceil,
    }


def _ends(
    x: torch.Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    same: str,
    ceil: bool,
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Padding at either end of the spatial axes as the file says, and up to where the last window ends."""
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if same:
        before, after = same_ends(x, extent, strides, same == "SAME_UPPER")
    return before, after, ceil_ends(x, extent, strides, before, after) if ceil else after


# --- largest -----------------------------------------------------------------------------------------------


@rule("MaxPool")
def max_pool(call: Call) -> Any:
    frame, ceil = _frame(call), _ceil(call)
    x = call.tensor(0)
    integers = call.dtype(0) in (torch.int8, torch.uint8)
    source = call.method("float", x) if integers else x
    if call.wants(1) or (ceil and not _fits(frame)):
        order = bool(call.attr("storage_order", 0))
        both = call.emit(max_pool_with_indices, source, **_everything(frame, ceil), column_major=order)
        y, indices = call.item(both, 0), call.item(both, 1)
    else:
        padding = frame.before
        if not _fits(frame):
            source, padding = padded(call, source, frame, float("-inf")), (0,) * frame.rank
        settings = told(padding=padding, dilation=frame.dilations, ceil_mode=ceil)
        y, indices = call.emit(_MAX[frame.rank], source, frame.kernel, frame.strides, **settings), None
    if integers:
        y = call.method("type_as", y, x)
    return (y, indices) if call.wants(1) else y


def max_pool_with_indices(
    x: torch.Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    same: str,
    ceil: bool,
    column_major: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooling with any padding, and the places of what it picks: in the whole tensor, as ONNX counts."""
    rank = len(kernel)
    before, _, last = _ends(x, kernel, strides, dilations, before, after, same, ceil)
    wide = F.pad(x, flat(before, last), "constant", float("-inf"))
    y, places = _MAX_WITH_INDICES[rank](wide, list(kernel), list(strides), [0] * rank, list(dilations))
    found = torch.zeros_like(places)
    step = 1
    # The places in the padded plane, axis by axis from the last, become places in the plane as it was.
    weights = _strides(x.shape[2:], column_major)
    for axis in reversed(range(rank)):
        found += (places // step % wide.size(2 + axis) - before[axis]) * weights[axis]
        step *= wide.size(2 + axis)
    planes = torch.arange(x.size(0) * x.size(1), device=x.device).reshape(x.size(0), x.size(1), *[1] * rank)
    return y, found + planes * x[0, 0].numel()


def _strides(shape: Sequence[int], column_major: bool) -> list[int]:
    """The distance in memory between neighbors along each axis."""
    found = [1]
    for size in shape[:-1] if column_major else reversed(shape[1:]):
        found.append(found[-1] * size)
    return found if column_major else found[::-1]


@rule("MaxUnpool")
def max_unpool(call: Call) -> fx.Node:
    kernel = call.attr("kernel_shape")
    strides, pads = call.attr("strides") or [1] * len(kernel), call.attr("pads") or [0] * (2 * len(kernel))
    shape = call.sizes(2) if call.has(2) else None
    return call.emit(unpooled, call.tensor(0), call.tensor(1), kernel, strides, pads, shape)


def unpooled(
    x: torch.Tensor,
    places: torch.Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    shape: Sequence[int] | None,
) -> torch.Tensor:
    """Every element back in its place, zeros between; filled up with zeros at the end to `shape`."""
    rank = len(kernel)
    sizes = [
        (size - 1) * s + k - begin - end
        for size, s, k, begin, end in zip(x.shape[2:], strides, kernel, pads[:rank], pads[rank:], strict=True)
    ]
    y = x.new_zeros(x.shape[:2].numel() * math.prod(sizes)).scatter(0, places.flatten(), x.flatten())
    y = y.reshape(*x.shape[:2], *sizes)
    if shape is None:
        return y
    return F.pad(y, flat([0] * rank, [want - have for want, have in zip(shape[2:], sizes, strict=True)]))


# --- mean --------------------------------------------------------------------------------------------------


@rule("AveragePool")
def average_pool(call: Call) -> fx.Node:
    frame, ceil = _frame(call), _ceil(call)
    x, count_pad = call.tensor(0), bool(call.attr("count_include_pad", 0))
    dense = all(d == 1 for d in frame.dilations)
    if dense and _fits(frame):
        settings = told(padding=frame.before, ceil_mode=ceil)
        if settings:
            settings |= told(count_include_pad=count_pad)
        return call.emit(_AVERAGE[frame.rank], x, frame.kernel, frame.strides, **settings)
    if dense and count_pad and not ceil:
        return call.emit(_AVERAGE[frame.rank], padded(call, x, frame), frame.kernel, frame.strides)
    return call.emit(average_pool_anyway, x, **_everything(frame, ceil), count_pad=count_pad)


def average_pool_anyway(
    x: torch.Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    same: str,
    ceil: bool,
    count_pad: bool,
) -> torch.Tensor:
    """The mean over windows with any padding and dilation: sums divided by counts."""
    before, after, last = _ends(x, kernel, strides, dilations, before, after, same, ceil)
    ones = torch.ones_like(x[:1, :1])
    ones = F.pad(ones, flat(before, after), "constant", float(count_pad))
    beyond = [end - begin for begin, end in zip(after, last, strict=True)]
    ones = F.pad(ones, flat([0] * len(beyond), beyond))
    counts = _window_means(ones, kernel, strides, dilations)
    return _window_means(F.pad(x, flat(before, last)), kernel, strides, dilations) / counts


def _window_means(
    x: torch.Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> torch.Tensor:
    if all(d == 1 for d in dilations):
        return _AVERAGE[len(kernel)](x, list(kernel), list(strides))
    ones = x.new_full((1, 1, *kernel), 1 / math.prod(kernel))
    means = _CONV[len(kernel)](x.flatten(0, 1)[:, None], ones, None, list(strides), 0, list(dilations))
    return means[:, 0].unflatten(0, x.shape[:2])


@rule("LpPool")
def lp_pool(call: Call) -> fx.Node:
    frame, ceil = _frame(call), _ceil(call)
    return call.emit(lp_pool_anyway, call.tensor(0), **_everything(frame, ceil), p=call.attr("p", 2))


def lp_pool_anyway(
    x: torch.Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    same: str,
    ceil: bool,
    p: int,
) -> torch.Tensor:
    """The p-norm of each window; padding counts as zeros."""
    before, _, last = _ends(x, kernel, strides, dilations, before, after, same, ceil)
    powers = F.pad(x.abs().pow(p), flat(before, last))
    return (_window_means(powers, kernel, strides, dilations) * math.prod(kernel)).pow(1 / p)


# --- over all of space -------------------------------------------------------------------------------------


@rule("GlobalAveragePool")
def global_average_pool(call: Call) -> fx.Node:
    rank = call.rank(0)
    if rank is None:
        return call.emit(global_mean, call.tensor(0))
    return call.method("mean", call.tensor(0), list(range(2, rank)), True)


def global_mean(x: torch.Tensor) -> torch.Tensor:
    """The mean over all axes but the first two, which stay as ones."""
    return x.mean(list(range(2, x.dim())), True)


@rule("GlobalMaxPool")
def global_max_pool(call: Call) -> fx.Node:
    # Of equal elements the first one gets the gradient, as from nn.AdaptiveMaxPool2d: amax would share it.
    pool = _ADAPTIVE_MAX.get(call.rank(0) or 0)
    return call.emit(global_max, call.tensor(0)) if pool is None else call.emit(pool, call.tensor(0), 1)


def global_max(x: torch.Tensor) -> torch.Tensor:
    """The largest over all axes but the first two, which stay as ones."""
    return x.flatten(2).max(2).values.reshape(*x.shape[:2], *[1] * (x.dim() - 2))


@rule("GlobalLpPool")
def global_lp_pool(call: Call) -> fx.Node:
    return call.emit(global_norm, call.tensor(0), call.attr("p", 2))


def global_norm(x: torch.Tensor, p: int) -> torch.Tensor:
    """The p-norm over all axes but the first two, which stay as ones."""
    return torch.linalg.vector_norm(x, p, list(range(2, x.dim())), True)
