"""Operators with a matrix or kernel of weights: Conv, ConvTranspose, Gemm, MatMul."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.rules.windows import (
    check_same,
    convolution,
    flat,
    is_same,
    known_shape,
    padded,
    told,
)
from onnxfuse.pytorch.bridge.values import Call

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@rule("Conv")
def conv(call: Call) -> fx.Node:
    frame = convolution(call, 1)
    check_same(call, frame)
    x, padding = call.tensor(0), frame.before
    if not frame.symmetric:
        x, padding = padded(call, x, frame), (0,) * frame.rank
    settings = told(
        stride=frame.strides, padding=padding, dilation=frame.dilations, groups=call.attr("group", 1)
    )
    return call.emit(_CONV[frame.rank], x, call.tensor(1), call.optional(2), **settings)


@rule("ConvTranspose")
def conv_transpose(call: Call) -> fx.Node:
    frame = convolution(call, 1)
    extra = tuple(call.attr("output_padding") or [0] * frame.rank)
    group = call.attr("group", 1)
    x, weight, bias = call.tensor(0), call.tensor(1), call.optional(2)
    shape = call.attr("output_shape")
    if shape or is_same(call):
        upper = call.attr("auto_pad") == "SAME_UPPER"
        shape = shape and shape[-frame.rank :]
        return call.emit(
            conv_transpose_to, x, weight, bias, shape, upper, frame.strides, extra, frame.dilations, group
        )
    # torch's output_padding is what its padding takes too much at the end.
    end = tuple(p + b - a for p, b, a in zip(extra, frame.before, frame.after, strict=True))
    limits = [max(s, d) for s, d in zip(frame.strides, frame.dilations, strict=True)]
    if min(frame.before) >= 0 and all(0 <= e < limit for e, limit in zip(end, limits, strict=True)):
        settings = told(
            stride=frame.strides,
            padding=frame.before,
            output_padding=end,
            groups=group,
            dilation=frame.dilations,
        )
        return call.emit(_TRANSPOSED[frame.rank], x, weight, bias, **settings)
    crop = flat([-b for b in frame.before], [p - a for p, a in zip(extra, frame.after, strict=True)])
    return call.emit(conv_transpose_cropped, x, weight, bias, crop, frame.strides, frame.dilations, group)


def _ends(total: Sequence[int], upper: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding split in two; the odd one goes to the end if `upper`."""
    small, large = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    return (small, large) if upper else (large, small)


def conv_transpose_cropped(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    crop: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    group: int,
) -> torch.Tensor:
    """A transposed convolution, cut or filled up with the bias at each end by `crop`, as F.pad counts."""
    rank = len(strides)
    y = F.pad(_TRANSPOSED[rank](x, weight, None, strides, 0, 0, group, dilations), list(crop))
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


def conv_transpose_to(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: Sequence[int] | None,
    upper: bool,
    strides: Sequence[int],
    extra: Sequence[int],
    dilations: Sequence[int],
    group: int,
) -> torch.Tensor:
    """A transposed convolution cut to that shape, by default that of the input times the strides.

    Args:
        upper: whether the odd element is cut off at the end.
        extra: ONNX's output_padding.
    """
    full = [
        s * (size - 1) + p + (k - 1) * d + 1
        for size, k, s, p, d in zip(x.shape[2:], weight.shape[2:], strides, extra, dilations, strict=True)
    ]
    if shape is None:
        # As in ONNX Runtime, it isn't filled up to that.
        shape = [min(f, size * s) for f, size, s in zip(full, x.shape[2:], strides, strict=True)]
    before, _ = _ends([max(f - n, 0) for f, n in zip(full, shape, strict=True)], upper)
    # What the padding leaves at the end; more than there is, is filled up.
    after = [n + b - (f - p) for n, b, f, p in zip(shape, before, full, extra, strict=True)]
    crop = flat([-b for b in before], after)
    return conv_transpose_cropped(x, weight, bias, crop, strides, dilations, group)


@rule("Gemm")
def gemm(call: Call) -> fx.Node:
    a, b = call.tensor(0), call.tensor(1)
    alpha, beta = _number(call.attr("alpha", 1.0)), _number(call.attr("beta", 1.0))
    if call.attr("transA", 0):
        a = call.method("t", a)
    columns = known_shape(call, 1) or ()
    c = known_shape(call, 2)
    if call.attr("transB", 0):
        if alpha == 1 and (not call.has(2) or (beta == 1 and c is not None and c == columns[:1])):
            return call.emit(F.linear, a, b, call.optional(2))
        b = call.method("t", b)
    if not call.has(2):
        product = call.emit(torch.mm, a, b)
        return product if alpha == 1 else call.emit(torch.mul, product, alpha)
    scales: dict[str, Any] = {"beta": beta, "alpha": alpha}
    return call.emit(torch.addmm, call.tensor(2), a, b, **{k: v for k, v in scales.items() if v != 1})


def _number(value: float) -> float | int:
    """Integers as such: torch takes no other factor for matrices of them."""
    return int(value) if float(value).is_integer() else value


@rule("MatMul")
def matmul(call: Call) -> fx.Node:
    return call.emit(torch.matmul, call.tensor(0), call.tensor(1))
