"""Operators that rearrange blocks, triangles and windows of a tensor; Einsum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from onnxfuse.pytorch.bridge.operands import like, number
from onnxfuse.pytorch.bridge.registry import rule
from onnxfuse.pytorch.bridge.rules.logic import target_type
from onnxfuse.pytorch.bridge.values import Call, Value


@rule("DepthToSpace")
def depth_to_space(call: Call) -> Value:
    block, mode = call.attr("blocksize"), call.attr("mode", "DCR")
    function = F.pixel_shuffle if mode == "CRD" else depth_first_shuffle
    return like(call, call.emit(function, call.tensor(0), block))


def depth_first_shuffle(x: Tensor, block: int) -> Tensor:
    """pixel_shuffle where a block's elements are the outer part of the channels."""
    n, c, h, w = x.shape
    blocks = x.reshape(n, block, block, c // block**2, h, w)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, c // block**2, h * block, w * block)


@rule("SpaceToDepth")
def space_to_depth(call: Call) -> Value:
    block, mode = call.attr("blocksize"), call.attr("mode", "DCR")
    function = F.pixel_unshuffle if mode == "CRD" else depth_first_unshuffle
    return like(call, call.emit(function, call.tensor(0), block))


def depth_first_unshuffle(x: Tensor, block: int) -> Tensor:
    """The inverse of `depth_first_shuffle`."""
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // block, block, w // block, block)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block**2, h // block, w // block)


@rule("Col2Im")
def col2im(call: Call) -> fx.Node:
    size, kernel = call.numbers(1), call.numbers(2)
    pads = call.attr("pads") or [0] * (2 * len(kernel))
    if len(kernel) != 2 or pads[:2] != pads[2:]:
        call.refuse("torch folds blocks of two axes only, padded alike on both ends")
    dilations, strides = call.attr("dilations") or [1, 1], call.attr("strides") or [1, 1]
    return call.emit(F.fold, call.tensor(0), size, kernel, dilations, pads[:2], strides)


@rule("CenterCropPad")
def center_crop_pad(call: Call) -> Value:
    axes = call.attr("axes")
    return like(call, call.emit(centered, call.tensor(0), call.sizes(1), axes))


def centered(x: Tensor, sizes: Sequence[int], axes: Sequence[int] | None) -> Tensor:
    """Cropped, or padded with zeros, to sizes of some axes, the same on both ends."""
    amounts = [0] * (2 * x.dim())
    for axis, size in zip(range(x.dim()) if axes is None else axes, sizes, strict=True):
        more = size - x.size(axis)
        last = 2 * (x.dim() - 1 - axis % x.dim())
        before = more // 2 if more > 0 else -(-more // 2)
        amounts[last : last + 2] = before, more - before
    return F.pad(x, amounts)


@rule("Trilu")
def trilu(call: Call) -> Value:
    offset: Any = 0
    if call.has(1):
        offset = number(call, 1)
        offset = call.method("item", call.tensor(1)) if offset is None else offset
    function = torch.triu if call.attr("upper", 1) else torch.tril
    return like(call, call.emit(function, call.tensor(0), offset))


@rule("EyeLike")
def eye_like(call: Call) -> Value:
    code = call.attr("dtype")
    dtype = call.dtype(0) if code is None else target_type(call, code)
    return Value("", dtype, 2, call.emit(diagonal, call.tensor(0), call.attr("k", 0), dtype))


def diagonal(x: Tensor, offset: int, dtype: torch.dtype | None) -> Tensor:
    """Ones on a diagonal, zeros elsewhere, in the shape of x."""
    return torch.ones_like(x, dtype=dtype).triu(offset).tril(offset)


@rule("Einsum")
def einsum(call: Call) -> fx.Node:
    return call.emit(torch.einsum, call.attr("equation"), *call.tensors())
